/*
 * cuts.pml: two lanes of one group, and the cuts over them.
 *
 * A lane is a filter thread: writes are published in its order, then
 * acknowledged.  Whoever heard of a write (by its acknowledgement, or by a read)
 * may issue another to any lane: that one depends on all that was heard of.  A
 * cut asks every lane to hold its answers, then to mark its order, then to let
 * go, and is completed when every lane says at the end that it has held all the
 * while.  Requests may arrive late, after the one who asked gave up.  A lane's
 * timer ends a hold at any moment, a kill forgets it.  A completed cut is offered
 * once the target holds every lane up to its mark.
 *
 * Asserted: what an offered cut holds is causally closed (invariants 4 and 8), and
 * in the end nobody waits (invariant 5).
 */
#ifndef NW
#define NW 2                                  /* writes a lane */
#endif
#ifndef NC
#define NC 2                                  /* cuts begun */
#endif
#ifndef NK
#define NK 1                                  /* kills of a filter */
#endif

byte issued[2]; bit fly[2]; byte need[2];     /* one write in flight a lane, and what it depends on */
byte pub[2]; byte ack[2]; byte seen[2];       /* published, acknowledged, heard of by anyone */
byte dep[8];                                  /* dep[4 * lane + n]: of write n, on the other lane */
byte dur[2];                                  /* durable at the target */
byte hold[2]; byte mk[2];                     /* the cut that a lane holds for, and where it marked */
byte qh[2]; byte qm[2]; byte qr[2];           /* requests under way: hold, mark, let go */
byte cut; byte phase; byte mem; byte conf; bit bad;   /* who cuts: its newest cut */
byte cm[2]; bit done; bit whole;              /* a completed cut */
byte kills = NK;
bit voided;

#define BIT(i) (1 << (i))
#define DEP(i, n) dep[4 * (i) + (n)]
#define MIN(a, b) ((a) < (b) -> (a) : (b))

#ifdef LOOSEN_c1
#define MARKED(i) ; hold[i] = 0               /* lets go before the others have marked */
#else
#define MARKED(i)
#endif
#ifdef LOOSEN_c2
#define MAY_MARK(i, c) true                   /* marks before it holds */
#else
#define MAY_MARK(i, c) (hold[i] == c)
#endif
#if defined(LOOSEN_c1) || defined(LOOSEN_c3)
#define KEPT(i, c) true                       /* a hold that ended by itself voids nothing */
#else
#define KEPT(i, c) (hold[i] == c)
#endif
#ifdef LOOSEN_c4
#define MAY_READ(i) true                      /* reads are answered while writes are held */
#else
#define MAY_READ(i) (hold[i] == 0)
#endif
#ifdef LOOSEN_c5
#define KILLED(i) if :: hold[i] != 0 -> ghost[i] = hold[i] :: else fi; hold[i] = 0
byte ghost[2];                                /* the successor takes the dead filter's hold for its own */
#define GHOST(i, c) || ghost[i] == c
#else
#define KILLED(i) hold[i] = 0
#define GHOST(i, c)
#endif
#ifdef LOOSEN_c6
#define DURABLE (dur[0] >= cm[0])             /* the lane of the record that completes it is enough */
#else
#define DURABLE (dur[0] >= cm[0] && dur[1] >= cm[1])
#endif
#ifdef LOOSEN_c7
#define TIMER false                           /* holds end only when they are told to */
#else
#define TIMER true
#endif
#ifdef LOOSEN_c8
#define MINE(c) true                          /* an answer to an older request counts */
#else
#define MINE(c) (c == cut && phase != 0)
#endif
#ifdef EARLY                                  /* a lane marks as soon as it holds itself */
#define ASK_EARLY(i) qm[i] = cut;
#define ASK_LATE(i)
#define READY(i, c) (hold[i] == c || qh[i] != c)
#elif defined(LOOSEN_c2)
#define ASK_EARLY(i) qm[i] = cut;
#define ASK_LATE(i)
#define READY(i, c) true
#else
#define ASK_EARLY(i)
#define ASK_LATE(i) qm[i] = cut;
#define READY(i, c) true
#endif
#ifdef CANARY_whole
#define CHECK_WHOLE assert(!(whole && cm[0] > 0 && cm[1] > 0))
#else
#define CHECK_WHOLE
#endif
#ifdef CANARY_partial
#define CHECK_PARTIAL assert(whole)
#else
#define CHECK_PARTIAL
#endif
#ifdef CANARY_void
#define CHECK_VOID assert(!voided)
#else
#define CHECK_VOID
#endif
#ifdef CANARY_killed
#define CHECK_KILLED assert(hold[0] == 0)
#else
#define CHECK_KILLED
#endif

/* every write of the content depends on what the content holds, too */
#define CLOSED(i, a, b) \
	(((a) < 1 || DEP(i, 1) <= (b)) && ((a) < 2 || DEP(i, 2) <= (b)) && ((a) < 3 || DEP(i, 3) <= (b)))

#define LANE(i) \
	/* a guest's write, from whoever knows what was heard of */ \
	:: d_step { issued[i] < NW && !fly[i] -> issued[i]++; fly[i] = 1; need[i] = seen[1 - i] } \
	:: d_step { fly[i] -> fly[i] = 0; pub[i]++; DEP(i, pub[i]) = need[i]; need[i] = 0 } \
	:: d_step { ack[i] < pub[i] && hold[i] == 0 -> ack[i] = pub[i]; seen[i] = pub[i] } \
	:: d_step { seen[i] < pub[i] && MAY_READ(i) -> seen[i] = pub[i] } \
	:: d_step { dur[i] < pub[i] && done -> dur[i]++ } \
	/* what it is asked for; confirmations of an older cut are nobody's */ \
	:: d_step { qh[i] != 0 -> \
		if \
		:: hold[i] == 0 -> hold[i] = qh[i]; if :: qh[i] == cut && phase == 1 -> conf = conf | BIT(i) :: else fi \
		:: else -> if :: qh[i] == cut -> bad = 1 :: else fi \
		fi; qh[i] = 0 } \
	:: d_step { qm[i] != 0 && READY(i, qm[i]) -> \
		if \
		:: MAY_MARK(i, qm[i]) GHOST(i, qm[i]) -> \
			if :: MINE(qm[i]) -> mk[i] = pub[i]; conf = conf | BIT(i + 2) :: else fi MARKED(i) \
		:: else -> if :: qm[i] == cut -> bad = 1 :: else fi \
		fi; qm[i] = 0 } \
	:: d_step { qr[i] != 0 -> \
		if \
		:: KEPT(i, qr[i]) GHOST(i, qr[i]) -> if :: MINE(qr[i]) -> conf = conf | BIT(i + 4) :: else fi \
		:: else -> if :: qr[i] == cut -> bad = 1; voided = 1 :: else fi \
		fi; if :: hold[i] == qr[i] -> hold[i] = 0 :: else fi; qr[i] = 0; CHECK_VOID } \
	/* ten milliseconds are over */ \
	:: d_step { hold[i] != 0 && TIMER -> hold[i] = 0 } \
	:: d_step { kills > 0 -> kills--; CHECK_KILLED; KILLED(i) }

#define ALL(shift) ((conf >> (shift)) & 3) == mem

active proctype system()
{
	do
	:: atomic {
		if
		LANE(0) LANE(1)
		/* a cut of both lanes, or of the one that lives */
		:: d_step { phase == 0 && cut < NC && !done -> cut++; phase = 1; mem = 3; conf = 0; bad = 0;
			qh[0] = cut; qh[1] = cut; ASK_EARLY(0) ASK_EARLY(1) skip }
		:: d_step { phase == 0 && cut < NC && !done -> cut++; phase = 1; mem = 1; conf = 0; bad = 0;
			qh[0] = cut; ASK_EARLY(0) skip }
		:: d_step { phase == 1 && ALL(0) && !bad -> phase = 2; ASK_LATE(0)
			if :: mem == 3 -> ASK_LATE(1) skip :: else fi }
		:: d_step { phase == 2 && ALL(2) && !bad -> phase = 3; qr[0] = cut;
			if :: mem == 3 -> qr[1] = cut :: else fi }
		:: d_step { phase == 3 && ALL(4) && !bad -> phase = 0; done = 1; whole = (mem == 3);
			cm[0] = mk[0]; cm[1] = (mem == 3 -> mk[1] : 0) }
		/* it gives up, or dies */
		:: d_step { phase != 0 -> phase = 0; conf = 0; bad = 0 }
		/* the target offers it, and what it holds is read */
		:: d_step { done && DURABLE ->
			if
			:: whole -> assert(CLOSED(0, MIN(cm[0], dur[0]), MIN(cm[1], dur[1])) && CLOSED(1, MIN(cm[1], dur[1]), MIN(cm[0], dur[0])));
				CHECK_WHOLE
			:: else -> CHECK_PARTIAL
			fi;
			done = 0; dur[0] = 0; dur[1] = 0; cm[0] = 0; cm[1] = 0; whole = 0 }
		:: else -> break
		fi
	   }
	od;
	/* nobody waits for a cut for ever */
	assert(hold[0] == 0 && hold[1] == 0 && ack[0] == pub[0] && ack[1] == pub[1])
}
