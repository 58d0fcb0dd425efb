/*
 * connect.pml: connections of one client, and chunks of the ring.
 *
 * A client sends write 1, loses its connection, connects again, sends write 1
 * again and, when that is acknowledged, write 2 of the same block.  Each
 * command needs two chunks of a pool of two, or the private reserve (one
 * unrecorded command at a time).  Payload arrives at any time or, on a dead
 * connection, never.  Rule: a new connection first drops what the old one had
 * not submitted and drains the rest, then is served; a command reserves all
 * its chunks or none.
 *
 * Commands: 0 = write 1 on connection A, 1 = write 1 on B, 2 = write 2 on B,
 * 3 = a write of another client to another block.
 */
#define FREE 0
#define RECV 1   /* chunks reserved, payload arriving */
#define SUBM 2   /* submitted to the backing */
#define DONE 3   /* published, chunks held until durable */
#define PART 4   /* loosened: holds one chunk, waits for the other */
#define GONE 5

byte st[4]; bit unrec[4];
byte pool = 2; bit spare = 1;
byte conn;               /* 0: A lives; 1: A lost; 2: B connected; 3: B served */
bit ack1; bit ack2; bit ack3;
byte blk;                /* newest write in the backing */
byte arrive = 15;        /* commands not sent yet */
byte seen;               /* 1 + bytes the client read on B while it had no write in flight */

#define OLDQUIET (st[0] == FREE || st[0] == DONE || st[0] == GONE)
#define VAL(c) ((c) == 2 -> 2 : 1)
#define LIVE(c) ((c) == 0 -> conn == 0 : ((c) == 3 -> 1 : conn == 3))
#define NOTSENT(c) ((arrive >> (c)) & 1)
/* range: commands 0..2 overlap */
#define RANGE(c) ((c) == 3 || (st[0] != SUBM && st[1] != SUBM && st[2] != SUBM))

inline freechunks(c) {
	if :: unrec[c] -> spare = 1; unrec[c] = 0 :: else -> pool = pool + 2 fi
}

#ifdef LOOSEN_k
#define TAKE(c) \
	:: d_step { NOTSENT(c) && LIVE(c) && SENDABLE(c) && pool >= 1 -> arrive = arrive & ~(1 << (c)); st[c] = PART; pool-- } \
	:: d_step { st[c] == PART && pool >= 1 -> st[c] = RECV; pool-- }
#else
#define TAKE(c) \
	:: d_step { NOTSENT(c) && LIVE(c) && SENDABLE(c) && pool >= 2 -> arrive = arrive & ~(1 << (c)); st[c] = RECV; pool = pool - 2 } \
	:: d_step { NOTSENT(c) && LIVE(c) && SENDABLE(c) && pool < 2 && spare -> arrive = arrive & ~(1 << (c)); st[c] = RECV; spare = 0; unrec[c] = 1 }
#endif
#define SENDABLE(c) ((c) != 2 || ack1)

#ifdef LOOSEN_j
/* a stalled command of a dead connection is kept */
#define ARRIVES(c) 1
#else
#define ARRIVES(c) LIVE(c)
#endif
#define CMD(c) \
	TAKE(c) \
	:: d_step { st[c] == RECV && ARRIVES(c) && RANGE(c) -> st[c] = SUBM } \
	:: d_step { st[c] == SUBM -> \
		if \
		:: (c) == 0 -> blk = 1; assert(conn != 3 || seen != 1) \
		:: (c) == 1 || (c) == 2 -> blk = VAL(c); seen = 0 \
		:: else \
		fi; \
		st[c] = DONE; \
		if \
		:: (c) == 3 -> ack3 = 1 \
		:: (c) == 2 -> ack2 = 1 \
		:: (c) == 1 -> ack1 = 1 \
		:: (c) == 0 && conn == 0 -> ack1 = 1 \
		:: else \
		fi } \
	/* durable (or unrecorded and done): the chunks go back */ \
	:: d_step { st[c] == DONE -> freechunks(c); st[c] = GONE }

active proctype system()
{
	do
	:: atomic {
		if
		CMD(0) CMD(1) CMD(2) CMD(3)
		/* a read (reads do not wait for writes) */
		:: d_step { conn == 3 && st[1] != SUBM && st[2] != SUBM && seen == 0 && NOTSENT(2) -> seen = blk + 1 }
		:: d_step { conn == 0 -> conn = 1; if :: ack1 -> arrive = arrive & ~2 :: else fi }
		:: d_step { conn == 1 -> conn = 2; arrive = arrive & ~1;
#ifndef LOOSEN_j
			/* drop what was not submitted */
			if :: st[0] == RECV || st[0] == PART ->
				if :: st[0] == RECV -> freechunks(0) :: else -> pool++ fi; st[0] = GONE
			:: else fi;
#endif
			skip }
#if defined(LOOSEN_i) || defined(LOOSEN_j)
		:: d_step { conn == 2 -> conn = 3 }
#else
		:: d_step { conn == 2 && OLDQUIET -> conn = 3 }  /* drain */
#endif
		:: else ->
#ifdef CANARY_unrecorded
			assert(false);
#endif
			/* every command of a live connection was served, no chunk is lost */
			assert(conn == 3 && ack1 && ack2 && ack3 && pool == 2 && spare);
			goto end
		fi;
		d_step {
			/* newer acknowledged bytes never go back */
			assert(!ack2 || blk == 2);
			assert(pool <= 2)
#ifdef CANARY_reserve
			; assert(!unrec[2])
#endif
		}
	   }
	od;
end:	skip
}
