/*
 * lease.pml: two processes over one store.  The store is a row of numbered
 * manifests, each created if absent; a manifest carries the lease number of
 * its writer and names all segments (a bit each).  A process takes the store
 * over by creating the next manifest with a higher lease.  It may be paused
 * anywhere.  Two processes can never both replace one manifest, and what one
 * acknowledged stays named.
 */
#define NM 7
byte lease[NM]; byte segs[NM]; byte last;     /* the store; manifest 0 is empty */
byte mine[2]; byte seen[2]; byte know[2];     /* lease (0: none), manifest number and segments last seen */
byte want[2];                                 /* segment written, its manifest not yet */
byte acked; byte made; byte takes = 3;

#define TOP (last)
#ifdef LOOSEN_l1
#define FREE(n) ((n) < NM)                    /* overwrites */
#else
#define FREE(n) ((n) < NM && (n) > last)
#endif

#define PROC(p) \
	/* take over: read the newest, create the next with a higher lease */ \
	:: d_step { mine[p] == 0 && takes > 0 && seen[p] != last + 1 -> seen[p] = last + 1; know[p] = segs[last] } \
	:: d_step { mine[p] == 0 && takes > 0 && seen[p] == last + 1 && FREE(seen[p]) -> \
		takes--; last = seen[p]; mine[p] = lease[last - 1] + 1; lease[last] = mine[p]; segs[last] = know[p] TAKEN } \
	/* write a segment */ \
	:: d_step { mine[p] != 0 && want[p] == 0 && made < 3 -> want[p] = 1 << made; made++ } \
	/* name it in the next manifest, or find that the store was taken */ \
	:: d_step { mine[p] != 0 && want[p] != 0 && seen[p] + 1 < NM && FREE(seen[p] + 1) -> \
		seen[p]++; \
		if :: seen[p] > last -> last = seen[p] :: else fi; \
		lease[seen[p]] = mine[p]; know[p] = know[p] | want[p]; segs[seen[p]] = know[p]; \
		acked = acked | want[p]; want[p] = 0 } \
	:: d_step { mine[p] != 0 && want[p] != 0 && seen[p] + 1 < NM && !FREE(seen[p] + 1) -> LOST(p) } \
	/* restart */ \
	:: d_step { mine[p] != 0 && takes > 0 -> mine[p] = 0; want[p] = 0; seen[p] = 0; know[p] = 0 }
#ifdef LOOSEN_l2
#define LOST(p) seen[p] = last                /* tries the next number with what it knew */
#else
#define LOST(p) mine[p] = 0; want[p] = 0; seen[p] = 0; know[p] = 0 CLASH
#endif
#ifdef CANARY_clash
#define CLASH ; assert(false)
#else
#define CLASH
#endif
#ifdef CANARY_taken
#define TAKEN ; assert(lease[last] < 3)
#else
#define TAKEN
#endif

active proctype system()
{
	do
	:: atomic {
		if
		PROC(0) PROC(1)
		:: else -> break
		fi;
		d_step {
			assert((segs[last] & acked) == acked);       /* invariant 7: nothing acknowledged is lost */
			assert(last == 0 || lease[last] >= lease[last - 1])
		}
	   }
	od
}
