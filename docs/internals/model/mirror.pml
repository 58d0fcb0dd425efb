/*
 * mirror.pml: a VM with two disks writes them itself and sends a copy of each write.
 *
 * A write reaches the image, then its copy is sent, then the guest is told; writes of
 * one disk overlap, so they go one after another.  A job may end at any moment: its
 * connection closes before the first write of which no copy is sent.  The filter
 * records copies, looks at the connections before it gives one its place, and reads
 * the image for blocks that are unshipped.  The keeper begins the jobs again, drains
 * the VM's writes, marks what the VM's bitmap has, and lets a gap end behind a barrier.
 * With THROUGH the filter reads through the VM, which answers no read while it drains.
 *
 * Asserted: what a position outside a gap holds is whole, has all that the guest was
 * told, and is causally closed over both disks (invariants 4 and 8); in the end no
 * write waits (5), no gap is open, and both ends hold the same (2).
 */
#ifndef NW
#define NW 2                                  /* writes a disk */
#endif
#ifndef NL
#define NL 1                                  /* jobs that end by themselves */
#endif
#ifndef NK
#define NK 1                                  /* kills of the filter */
#endif
#ifndef NS
#define NS 0                                  /* barriers that nobody waits for */
#endif
#define TORN 9

byte iss[2]; byte st[2]; bit via[2];          /* the VM: writes given; of the one in flight, how far, and whether a job saw it begin */
byte img[2]; byte tgt[2]; byte told[2];       /* newest write on the image, in the order, told to the guest */
byte dep[6];                                  /* dep[3 * disk + n]: of write n, on the other disk */
bit job[2]; bit conn[2]; bit bm[2]; bit nb[2];
bit un[2] = 1; bit live; bit gap = 1;
bit settled;                                  /* a drain came after every copy had begun */
byte cst; byte cd; byte cv; bit stale;        /* the sync copy: 1 holds its range, 2 has read, 3 gave way */
byte kp; bit drain; bit began; bit lost;      /* the keeper; whether a copy began, a connection closed, since it drains */
byte losses = NL; byte kills = NK; byte early = NS; bit again;

#define DEP(d, n) dep[3 * (d) + (n)]
#define IDLE (st[0] == 0 && st[1] == 0)
#define BOTH (conn[0] && conn[1])
#define CLOSED(d) (tgt[d] < 1 || DEP(d, tgt[d]) <= tgt[1 - (d)])
#define POINT assert(gap || (tgt[0] != TORN && tgt[1] != TORN && tgt[0] >= told[0] && tgt[1] >= told[1] && CLOSED(0) && CLOSED(1)))
#ifdef LOOSEN_m13
#define UNDER_WAY 0                           /* a drain is for copies that were begun, not ended */
#else
#define UNDER_WAY (cst != 0)
#endif
#define SETTLE began = UNDER_WAY; lost = 0; nb[0] = 0; nb[1] = 0; drain = 1; kp = 5
#define LOSE live = 0; gap = 1; lost = 1; again = 1

#ifdef LOOSEN_m1
#define LOOK(d) if :: live && !conn[d] -> LOSE :: else fi   /* a record looks at its own connection only */
#else
#define LOOK(d) if :: live && !BOTH -> LOSE :: else fi
#endif
#ifdef LOOSEN_m2
#define SETTLED true                          /* a gap ends without a barrier */
#else
#define SETTLED settled
#endif
#ifdef LOOSEN_m3
#define DRAINED_FOR true                      /* a barrier is for copies that began behind its drain */
#else
#define DRAINED_FOR (!began)
#endif
#ifdef LOOSEN_m4
#define DRAINED true                          /* bitmaps are read before the writes have ended */
#else
#define DRAINED IDLE
#endif
#ifdef LOOSEN_m12
#define STALE                                 /* a copy under way clears what was marked since it began */
#else
#define STALE stale = (cst != 0)
#endif
#ifdef LOOSEN_m5
#define MARK skip                             /* what the bitmaps have is not marked */
#else
#define MARK un[0] = un[0] || bm[0]; un[1] = un[1] || bm[1]; STALE
#endif
#ifdef LOOSEN_m6
#define ENDS(d) job[d] = 0                    /* the connection closes later */
#else
#define ENDS(d) job[d] = 0; conn[d] = 0
#endif
#ifdef LOOSEN_m7
#define KEPT true                             /* older bitmaps go although a connection closed */
#else
#define KEPT (live && !lost)
#endif
#ifdef LOOSEN_m8
#define FREE(d) true                          /* a copy does not hold its range */
#else
#define FREE(d) (cst == 0 || cst == 3 || cd != d)
#endif
#ifdef THROUGH
#define MAY_READ (!drain)
#else
#define MAY_READ true
#endif
#if defined(THROUGH) && !defined(LOOSEN_m9)   /* m9: the VM waits for a copy as long as that takes */
#define MAY_GIVE_WAY true
#else
#define MAY_GIVE_WAY false
#endif
#ifdef LOOSEN_m10
#define GIVE_WAY cst = 3                      /* what gave way is published all the same */
#else
#define GIVE_WAY cst = 0; stale = 0
#endif
#ifdef CANARY_again
#define CHECK_AGAIN assert(!again)
#else
#define CHECK_AGAIN
#endif
#ifdef CANARY_torn
#define CHECK_TORN assert(cv != TORN)
#else
#define CHECK_TORN
#endif
#ifdef CANARY_way
#define CHECK_WAY assert(false)
#else
#define CHECK_WAY
#endif

#define DISK(d) \
	/* a write begins: a job that is there sees it */ \
	:: d_step { iss[d] < NW && st[d] == 0 && !drain -> iss[d]++; st[d] = 1; DEP(d, iss[d]) = told[1 - (d)]; via[d] = job[d] } \
	:: d_step { st[d] == 1 -> img[d] = iss[d]; bm[d] = 1; nb[d] = 1; st[d] = 2 } \
	:: d_step { st[d] == 2 && via[d] && job[d] -> st[d] = 3 } \
	:: d_step { st[d] == 2 && !(via[d] && job[d]) -> told[d] = iss[d]; st[d] = 0 } \
	:: d_step { st[d] == 3 && FREE(d) -> LOOK(d); tgt[d] = iss[d]; st[d] = 4; POINT } \
	/* its connection is gone with it, or with its answer */ \
	:: d_step { (st[d] == 3 || st[d] == 4) && !conn[d] -> told[d] = iss[d]; st[d] = 0 } \
	:: d_step { st[d] == 4 -> told[d] = iss[d]; st[d] = 0 } \
	:: d_step { losses > 0 && job[d] -> losses--; ENDS(d) } \
	:: d_step { conn[d] && !job[d] -> conn[d] = 0 } \
	:: d_step { live && cst == 0 && un[d] && st[d] != 4 -> cst = 1; cd = d; settled = 0; began = 1 }

active proctype system()
{
	do
	:: atomic {
		if
		DISK(0) DISK(1)
		/* a write that is under way to the image may be seen in part */
		:: d_step { cst == 1 && MAY_READ -> cv = img[cd]; cst = 2 }
		:: d_step { cst == 1 && MAY_READ && st[cd] == 1 -> cv = TORN; cst = 2; CHECK_TORN }
		:: d_step { cst >= 2 -> LOOK(cd); tgt[cd] = cv; un[cd] = stale; stale = 0; cst = 0; cv = 0; POINT }
		:: d_step { MAY_GIVE_WAY && (cst == 1 || cst == 2) && st[cd] == 3 -> GIVE_WAY; CHECK_WAY }
		/* the filter hears of a connection that closed; ends a gap; is killed */
		:: d_step { live && !BOTH -> LOSE }
		:: d_step { live && gap && BOTH && !un[0] && !un[1] && cst == 0 && SETTLED -> gap = 0; POINT; CHECK_AGAIN }
		:: d_step { kills > 0 -> kills--; cst = 0; cv = 0; stale = 0; LOSE; job[0] = 0; job[1] = 0; conn[0] = 0; conn[1] = 0; settled = 0; began = 1 }
		/* begin */
		:: d_step { kp == 0 && !live -> job[0] = 0; job[1] = 0; conn[0] = 0; conn[1] = 0; kp = 1 }
		:: d_step { kp == 1 -> job[0] = 1; job[1] = 1; conn[0] = 1; conn[1] = 1; drain = 1; kp = 2 }
		:: d_step { kp == 2 && DRAINED -> drain = 0; kp = 3 }
		:: d_step { kp == 3 -> MARK; kp = 4 }
		:: d_step { kp == 4 -> live = BOTH; kp = 0 }
		/* a barrier, and older bitmaps go */
		:: d_step { kp == 0 && live && gap && !un[0] && !un[1] && !settled -> SETTLE }
		:: d_step { kp == 0 && live && early > 0 -> early--; SETTLE }
		:: d_step { kp == 5 && IDLE -> drain = 0; kp = 6 }
		:: d_step { kp == 6 -> LOOK(0);
			if :: live && !lost && DRAINED_FOR -> settled = 1 :: else fi;
			if :: KEPT -> bm[0] = nb[0]; bm[1] = nb[1] :: else fi;
			kp = 0 }
		:: else -> break
		fi
	   }
	od;
	/* nothing waits, no gap is open, the target holds what the image does */
	assert(IDLE && !gap && tgt[0] == img[0] && tgt[1] == img[1])
}
