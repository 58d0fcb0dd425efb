/*
 * stream.pml: restart of a sealing process and the target's hand-over (rule
 * 11).  A stream is one start of a source appliance.  The target keeps a
 * received tail above its durable prefix; a record that two streams both
 * sealed must never stand in its history twice, and no record may be missing.
 *
 * N records; NS streams; the connection is a channel in which sealed records
 * of a dead stream may still travel when the next one has connected.  The
 * source resends what it has not seen durable (it may read again any record
 * whose slot is not released: all above `acked`).
 */
#ifndef N
#define N 3
#endif
#ifndef NS
#define NS 3
#endif
#define Q 3

byte ws[Q]; byte wq[Q]; byte wn;      /* on the wire: stream, seq */
byte cur;               /* stream of the live source process; 0: dead */
byte started;           /* streams started so far */
byte pos;               /* next seq to seal; 0: has not been told yet */
byte acked;             /* durable position seen by the source: slots below are released */
byte sess;              /* stream whose session the target accepts */
byte hist[N];           /* stream that sealed record i of the target's history */
byte dur; byte rcv;     /* durable and received length of the history */
bit sealed[NS * N];     /* stream s has sealed record i */
byte crashes = 1;

#define SEAL(s, q) sealed[((s) - 1) * N + (q) - 1]

active proctype system()
{
	byte s; byte q;
	do
	:: atomic {
		if
		/* a source appliance starts, and one dies at any time */
		:: d_step { cur == 0 && started < NS -> started++; cur = started; pos = 0 }
		:: d_step { cur != 0 && started < NS - 1 + (crashes == 0) -> cur = 0; pos = 0 }
		/* hello: the target opens the stream */
		:: atomic { cur != 0 && pos == 0 ->
#if defined(LOOSEN_11a) || defined(LOOSEN_11d)
			/* what it holds above durable is kept, durable is named */
			skip;
#else
			if
			:: dur = rcv                     /* sync */
			:: rcv > dur ->                  /* cut */
				do :: rcv > dur -> rcv--; hist[rcv] = 0 :: else -> break od
			:: rcv == dur
			fi;
#endif
#ifdef LOOSEN_11c
			/* goes on from its own idea of the position */
			pos = acked + 1;
#else
#ifdef LOOSEN_11d
			/* the target names what it had received, then cuts it */
			pos = rcv + 1;
			do :: rcv > dur -> rcv--; hist[rcv] = 0 :: else -> break od;
#else
			pos = dur + 1;
#endif
#endif
#ifndef LOOSEN_11b
			sess = cur;
#endif
			skip }
		/* seal and send the next record; its slot must still be there */
		:: d_step { cur != 0 && pos != 0 && pos <= N && wn < Q ->
			assert(pos > acked);
			assert(!SEAL(cur, pos));         /* one stream never uses a nonce twice */
			SEAL(cur, pos) = 1; ws[wn] = cur; wq[wn] = pos; wn++; pos++ }
		/* the target receives: in order, of the accepted stream; the rest is dropped */
		:: d_step { wn > 0 -> s = ws[0]; q = wq[0]; ws[0] = ws[1]; wq[0] = wq[1]; ws[1] = ws[2]; wq[1] = wq[2]; ws[2] = 0; wq[2] = 0; wn--;
			if
#ifdef LOOSEN_11b
			:: q == rcv + 1 ->
#else
#ifdef LOOSEN_11e
			:: s == sess ->
				if :: q <= rcv -> rcv = q - 1 :: else fi;
				assert(q == rcv + 1);
#else
			:: s == sess && q == rcv + 1 ->
#endif
#endif
				hist[rcv] = s; rcv = q
#ifdef LOOSEN_11a
			:: s == sess && q <= rcv -> hist[q - 1] = s
#endif
			:: else
			fi;
			s = 0; q = 0 }
		:: d_step { rcv > dur -> dur = rcv }
		:: d_step { cur != 0 && pos != 0 && acked < dur -> acked = dur
#ifdef CANARY_streams
			; assert(!(dur == N && hist[0] != hist[1] && hist[1] != hist[2] && hist[0] != 0))
#endif
		   }
		/* crash of the target: the session and all that was not synced are lost */
		:: atomic { crashes > 0 -> crashes--;
			do :: rcv > dur -> rcv--; hist[rcv] = 0 :: else -> break od;
			cur = 0; pos = 0; sess = 0; wn = 0;
			ws[0] = 0; ws[1] = 0; ws[2] = 0; wq[0] = 0; wq[1] = 0; wq[2] = 0 }
		:: else ->
			assert(cur != 0 && dur == N && acked == N);
			goto end
		fi;
		d_step {
			/* the sealing streams of the history never go back, nothing is
			 * missing: a tail of an older stream above a record of a newer
			 * one means that a record was sealed twice in one history */
			assert(dur <= rcv && rcv <= N && acked <= dur);
			assert(rcv < 1 || hist[0] != 0);
			assert(rcv < 2 || hist[1] >= hist[0]);
			assert(rcv < 3 || hist[2] >= hist[1]);
			assert(cur == 0 || pos == 0 || pos <= rcv + Q + 1)
		}
	   }
	od;
end:	skip
}
