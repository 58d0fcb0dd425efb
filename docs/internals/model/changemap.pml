/*
 * changemap.pml: change map, ring order, gap, restart and power loss of one
 * lane with one target.  Two blocks (one bit each), two generations, a ring of
 * RC slots, a table of two commands in flight.
 *
 * Built by ./check, which chooses sizes and features:
 *   NW      guest writes                NK   kills of the filter process
 *   NC      target crashes, appliance crashes, reconnects (all cut the target
 *           back to its durable position)
 *   NP      power losses of the source host (NP > 0 needs POWER)
 *   NF      failed or short backing writes and failed re-reads
 *   NM      merges of generations       NL   losses of spilled records
 *   SPILL   how many records the source may keep past the ring
 *   POWER   write-intent, checkpoint, flush, sequence high-water mark
 *   DELTA   skip of equal blocks; the last write puts the initial bytes back
 *   MOVED   a hole moves the generations to unshipped, as the code does, in place of adding them
 *   NONET   nothing is ever received: the guest must still be served
 *   LOOSEN_x  one rule loosened: must be found
 *   CANARY_x  an assertion that must fail: shows that an event is reachable
 *
 * All steps are atomic actions of one process.  What one filter thread does in
 * several stores that a kill can separate is several actions; `BUSY` keeps the
 * thread's other work out between them, but not the backing, the network, the
 * target, the checkpoint, the clearing of sealed generations, or a kill.
 *
 * Sequence numbers are kept relative to the target's durable position: log[0]
 * is durable + 1.  h = head, r = received, last_seq 0 = covered.  After a power
 * loss the first s records exist at the target only.  The first sp ones have
 * left the ring and are kept by the source.
 *
 * Bytes: write i puts 2*i; a torn write i puts 2*i-1; 0 is the initial state.
 * Writes to one block are numbered in the order in which they held its range,
 * so "at least as new as" is >=.
 */
#ifndef NW
#define NW 3
#endif
#ifndef NK
#define NK 1
#endif
#ifndef NC
#define NC 1
#endif
#ifndef NP
#define NP 0
#endif
#ifndef NF
#define NF 0
#endif
#ifndef NM
#define NM 0
#endif
#ifndef NL
#define NL 0
#endif
#ifndef RC
#define RC 3
#endif
#define W 8

/* command kinds */
#define KW 1   /* write with a slot */
#define KU 2   /* write without: unshipped and gap */
#define KC 3   /* sync copy of the resync */
#define KR 4   /* re-read: failed write, or replay after a restart */
/* command states */
#define FREE 0
#define SLOT 1 /* copy: slot held, waits for its range */
#define SUBM 2 /* in the table, submitted to the backing */
#define DONE 3 /* backing done (copy: range held, marked, read) */
#define FAIL 4 /* backing failed or short */
#define SEQD 5 /* seq stored in the entry, last_seq raised */
#define HEAD 7 /* head advanced: committed */
#define MARK 8 /* marked, not yet in the table (same thread) */
#define LATE 9 /* loosened variants only */
/* record kinds */
#define RW 0
#define RS 1
#define GB 2
#define GE 3

byte st[2]; byte kd[2]; byte bl[2]; byte va[2]; bit ge[2];
byte src[2];          /* source bytes as the guest reads them */
byte td[2];           /* target bytes at its durable position */
bit  tgap;            /* durable position lies in a gap */
byte ack[2];          /* newest bytes that the guest knows to be there */
byte gen[2]; byte lastq[2]; bit op;
byte unsh;            /* unshipped */
bit  flag; bit begun; /* gap flag; gap-begin committed */
bit  rsv = 1;         /* the reserved descriptor of gap-begin */
byte gst;             /* gap record: 1 begin stored, 2 begin committed, 3 end stored, 4 end committed */
byte lr[W];           /* kind << 5 | block << 4 | bytes */
byte ls[W];           /* ghost: ack[] at publication; 255 inside a gap */
byte h; byte r; byte s;
#ifdef SPILL
byte sp;
#define GONE (s > sp -> s : sp)
#else
#define GONE s
#endif
byte jp;              /* 1 + place in log[] of a record that does not follow the one before */
bit  up = 1; bit srv = 1;
byte nw; byte kills; byte cuts; byte powers; byte fails; byte merges; byte losses;
#ifdef POWER
byte sd[2];           /* source bytes that survive a power loss */
byte wi;              /* write-intent, durable */
byte ckd; byte ckb; bit ckrun; bit flrun;
byte fph[2]; byte cph[2]; /* 0 needed, 1 started, 2 ended */
byte credit = 2;      /* sequence numbers left below the persisted mark */
#ifdef LOOSEN_8d
byte over;
#endif
#ifdef LOOSEN_9c
byte fdur;
#endif
#ifdef LOOSEN_9e
byte ckg;
#endif
#endif
#ifdef DELTA
byte hv[2];           /* answer of the target: durable bytes + 1; 0 none */
#endif
#ifdef LOOSEN_7b
byte zb; byte zv;     /* I/O of the dead process, landing late */
#endif
hidden byte i; hidden byte j; hidden byte hd[2]; hidden byte hg; hidden byte f;

#define B(b) (1 << (b))
#define HOLDS(e, b) (st[e] != FREE && bl[e] == (b) && st[e] != LATE && !(kd[e] == KC && st[e] == SLOT))
#define HELD(b) (HOLDS(0, b) || HOLDS(1, b))
#define BUSY (st[0] == SEQD || st[1] == SEQD || st[0] == HEAD || st[1] == HEAD || st[0] == MARK || st[1] == MARK || gst != 0)
#define SL(e) (st[e] != FREE && kd[e] != KU && st[e] != HEAD && !(kd[e] == KC && st[e] == MARK))
#define USED ((h - GONE) + SL(0) + SL(1) + rsv + (gst == 1 || gst == 3))
#define ROOM (RC - USED)
#define COUNTS(e, g) (st[e] != FREE && st[e] != MARK && st[e] != LATE && kd[e] != KU && !(kd[e] == KC && st[e] == SLOT) && ge[e] == (g) UNCOUNTED(e))
#ifdef LOOSEN_7d
#define UNCOUNTED(e) && kd[e] != KR
#else
#ifdef LOOSEN_1b
#define UNCOUNTED(e) && st[e] != SUBM
#else
#define UNCOUNTED(e)
#endif
#endif
#define DIRTY(b) (((gen[0] | gen[1] | unsh) & B(b)) != 0)
#ifdef DELTA
#define CLS(v) ((v) == 2 * NW -> 0 : (v))
#else
#define CLS(v) (v)
#endif
#ifdef LOOSEN_4h
#define UB(b) 3       /* one bit covers both blocks, a copy only one of them */
#else
#define UB(b) B(b)
#endif

inline wipe(e) { st[e] = 0; kd[e] = 0; bl[e] = 0; va[e] = 0; ge[e] = 0 }

inline touched(b) {   /* a mark of block b */
#ifdef POWER
	cph[b] = 0;
#endif
#ifdef DELTA
#ifndef LOOSEN_10d
	hv[b] = 0;
#endif
#endif
	skip
}

inline wrote(b) {     /* the backing changed block b */
#ifdef POWER
#ifdef LOOSEN_9c
	fdur = fdur | B(b);
	if :: fph[b] == 2 -> fph[b] = 0 :: else fi;
#else
	fph[b] = 0;
#endif
#endif
	skip
}

inline mark(b) { gen[op] = gen[op] | B(b); touched(b) }
inline unship(b) { unsh = unsh | UB(b); touched(b) }

inline pop() {        /* forget log[0] */
	i = 0;
	do :: i < W - 1 -> lr[i] = lr[i + 1]; ls[i] = ls[i + 1]; i++ :: else -> break od;
	lr[W - 1] = 0; ls[W - 1] = 0;
	h--;
	if :: s > 0 -> s-- :: else fi;
#ifdef SPILL
	if :: sp > 0 -> sp-- :: else fi;
#endif
	if :: jp > 0 -> jp-- :: else fi;
	if :: lastq[0] > 0 -> lastq[0]-- :: else fi;
	if :: lastq[1] > 0 -> lastq[1]-- :: else fi;
	i = 0
}

inline truncate(n) {  /* forget log[n..] */
	i = n;
	do :: i < W -> lr[i] = 0; ls[i] = 0; i++ :: else -> break od;
	h = n;
#ifdef SPILL
	if :: sp > n -> sp = n :: else fi;
#endif
	if :: lastq[0] > n -> lastq[0] = n :: else fi;
	if :: lastq[1] > n -> lastq[1] = n :: else fi;
	i = 0
}

inline fold() {       /* hd, hg: bytes and gap state at head */
	hd[0] = td[0]; hd[1] = td[1]; hg = tgap; i = 0;
	do
	:: i < h ->
		j = lr[i] >> 5;
		if
		:: j == GB -> hg = 1
		:: j == GE -> hg = 0
		:: else -> hd[(lr[i] >> 4) & 1] = lr[i] & 15
		fi;
		i++
	:: else -> break
	od
}

/* commit one record; invariant 8 (and 4): outside a gap the bytes at this
 * position hold all that the guest was told, and nothing the source has not */
inline append(k, b, v) {
	assert(h < W);
	lr[h] = ((k) << 5) | ((b) << 4) | (v);
	h++;
	fold();
	if
	:: hg -> ls[h - 1] = 255
	:: else ->
		assert(hd[0] >= ack[0] && hd[0] <= src[0]);
		assert(hd[1] >= ack[1] && hd[1] <= src[1]);
		ls[h - 1] = (ack[0] << 4) | ack[1]
	fi;
#ifdef POWER
#ifdef LOOSEN_8d
	if :: credit > 0 -> credit-- :: else -> over++ fi;
#else
	credit--;
#endif
#endif
	i = 0; j = 0
}

/* invariant 2, after every action */
inline invariants() {
	assert(src[0] == td[0] || DIRTY(0));
	assert(src[1] == td[1] || DIRTY(1));
#ifdef CANARY_ack
	assert(!(ack[1] == 2 * NW && ack[0] != 0 && !flag));
#endif
	assert(h <= W && r <= h && s <= r);
#ifdef SPILL
	assert(sp <= h)
#endif
}

#ifdef POWER
#ifdef LOOSEN_8d
#define CREDIT 1
#else
#define CREDIT (credit > 0)
#endif
#else
#define CREDIT 1
#endif

#ifdef LOOSEN_6b
#define GAPFIRST 0
#else
#define GAPFIRST (flag && !begun)
#endif

#ifdef LOOSEN_7c
#define SERVED up
#else
#define SERVED (up && srv)
#endif

/* ---- guest ---- */
#define WRITE(e, b) \
	:: d_step { SERVED && srv && nw > 0 && !BUSY && st[e] == FREE && ((e) == 0 || st[0] != FREE) && !HELD(b) && ((b) == 0 || nw < NW) && ROOM > 0 -> \
		nw--; st[e] = MARK; kd[e] = KW; bl[e] = b; va[e] = 2 * (NW - nw); ge[e] = op; \
		MARKW(b) } \
	:: d_step { SERVED && srv && nw > 0 && !BUSY && st[e] == FREE && ((e) == 0 || st[0] != FREE) && !HELD(b) && ((b) == 0 || nw < NW) -> \
		nw--; OVERFLOW st[e] = MARK; kd[e] = KU; bl[e] = b; va[e] = 2 * (NW - nw); \
		MARKU(b) }
#ifdef LOOSEN_1a
#define MARKW(b) skip
#else
#define MARKW(b) mark(b)
#endif
#ifdef LOOSEN_1c
#define MARKU(b) if :: !begun -> flag = 1 :: else fi
#else
#ifdef LOOSEN_6a
#define MARKU(b) unship(b)
#else
#define MARKU(b) unship(b); flag = 1
#endif
#endif
/* a guest's write finds no slot only when guest records fill their half */
#define OVERFLOW overflow();
inline overflow() {
#ifdef CHECK_HALF
	if
	:: ROOM <= 0 ->
		j = 0; i = 0;
		do :: i < h -> if :: i >= GONE && (lr[i] >> 5) == RS -> j++ :: else fi; i++ :: else -> break od;
		if :: st[0] != FREE && kd[0] == KC && st[0] != HEAD -> j++ :: else fi;
		if :: st[1] != FREE && kd[1] == KC && st[1] != HEAD -> j++ :: else fi;
		assert(j <= RC / 2); i = 0; j = 0
	:: else
	fi
#else
	skip
#endif
}

#ifdef POWER
#ifdef LOOSEN_9a
#define INTENT(b) skip
#else
#define INTENT(b) if :: (wi & B(b)) == 0 -> wi = wi | B(b); fph[b] = 0; cph[b] = 0 :: else fi
#endif
#else
#define INTENT(b) skip
#endif

#ifdef LOOSEN_7c
#define NOTHELD(b) 1
#else
#define NOTHELD(b) (!HELD(b))
#endif

#define COMMAND(e) \
	:: d_step { up && st[e] == MARK -> st[e] = SUBM; INTENT(bl[e]) } \
	:: d_step { up && st[e] == SUBM -> src[bl[e]] = va[e]; st[e] = DONE; wrote(bl[e]); } \
	:: d_step { up && st[e] == SUBM && fails > 0 -> fails--; st[e] = FAIL } \
	:: d_step { up && st[e] == SUBM && fails > 0 -> fails--; st[e] = FAIL; src[bl[e]] = va[e] - 1; wrote(bl[e]) } \
	REREAD(e) \
	/* unrecorded: acknowledged, the gap is recorded */ \
	:: d_step { up && st[e] == DONE && kd[e] == KU && !BUSY -> ack[bl[e]] = va[e]; assert(flag GAPOK); wipe(e) } \
	:: d_step { up && st[e] == FAIL && kd[e] == KU && !BUSY -> wipe(e) } \
	/* publish */ \
	:: d_step { up && st[e] == DONE && kd[e] != KU && !BUSY && !GAPFIRST && CREDIT -> \
		st[e] = SEQD; EARLYCLEAR(e) RAISE(e, h + 1) } \
	:: d_step { up && st[e] == SEQD -> \
		append((kd[e] == KW -> RW : RS), bl[e], va[e]); st[e] = HEAD } \
	:: d_step { up && st[e] == HEAD -> \
		LATERAISE(e) \
		if :: kd[e] == KW -> ack[bl[e]] = va[e] :: kd[e] == KC -> COPIED(e) :: else fi; \
		DROP(e) }
#ifdef LOOSEN_6a
#define GAPOK || 1
#else
#define GAPOK
#endif
#ifdef LOOSEN_2b
#define RAISE(e, q) skip
#define LATERAISE(e) lastq[ge[e]] = (lastq[ge[e]] < h -> h : lastq[ge[e]]);
#else
#define RAISE(e, q) lastq[ge[e]] = q
#define LATERAISE(e)
#endif
#ifdef LOOSEN_4a
#define EARLYCLEAR(e) if :: kd[e] == KC -> unsh = unsh & ~UB(bl[e]) :: else fi;
#else
#define EARLYCLEAR(e)
#endif
#ifdef LOOSEN_4b
/* range released, unshipped cleared later */
#define COPIED(e) skip
#define DROP(e) if :: kd[e] == KC -> st[e] = LATE; va[e] = 0; ge[e] = 0 :: else -> wipe(e) fi
#else
#define COPIED(e) unsh = unsh & ~UB(bl[e])
#define DROP(e) wipe(e)
#endif

#ifdef LOOSEN_3a
/* a failed write is forgotten */
#define REREAD(e) :: d_step { up && st[e] == FAIL && kd[e] == KW && !BUSY -> wipe(e) }
#else
#ifdef LOOSEN_3c
/* re-reads queue behind the resync copy */
#define BEHIND(e) && kd[1 - e] != KC
#else
#define BEHIND(e)
#endif
#ifdef LOOSEN_3b
/* the intended bytes are published, not what the backing holds */
#define REVAL(e) skip
#else
#define REVAL(e) va[e] = src[bl[e]]
#endif
#ifdef LOOSEN_3d
#define REFAIL(e) skip
#else
#define REFAIL(e) unship(bl[e]); flag = 1
#endif
#define REREAD(e) \
	:: d_step { up && st[e] == FAIL && kd[e] == KW && !BUSY BEHIND(e) -> REVAL(e); kd[e] = KR; st[e] = DONE } \
	:: d_step { up && st[e] == FAIL && kd[e] == KW && !BUSY && fails > 0 BEHIND(e) -> fails--; REFAIL(e); wipe(e) }
#endif

/* ---- resync copy: slot, range, mark, read ---- */
#ifdef LOOSEN_4d
#define HALF 1
#else
#define HALF (1 + RC / 2)
#endif
#ifdef LOOSEN_4e
#define CPRANGE(b) 1
#else
#define CPRANGE(b) (!HELD(b))
#endif
#ifdef LOOSEN_4f
#define CPMARK(b) touched(b)
#else
#define CPMARK(b) mark(b)
#endif
#ifdef LOOSEN_4c
/* range before slot */
#define COPY(e, b) \
	:: d_step { SERVED && srv && !BUSY && st[e] == FREE && ((e) == 0 || st[0] != FREE) && kd[1 - e] != KC && (unsh & B(b)) && !HELD(b) -> \
		st[e] = MARK + 2; kd[e] = KC; bl[e] = b } \
	:: d_step { up && st[e] == MARK + 2 && bl[e] == b && !BUSY && ROOM > RC / 2 - 1 -> \
		CPMARK(b); ge[e] = op; va[e] = src[b]; st[e] = DONE }
#else
#define COPY(e, b) \
	:: d_step { SERVED && srv && !BUSY && st[e] == FREE && ((e) == 0 || st[0] != FREE) && kd[1 - e] != KC && (unsh & B(b)) && ROOM >= HALF -> \
		st[e] = SLOT; kd[e] = KC; bl[e] = b } \
	:: d_step { up && st[e] == SLOT && kd[e] == KC && bl[e] == b && !BUSY && CPRANGE(b) -> \
		if :: (unsh & B(b)) -> CPMARK(b); ge[e] = op; va[e] = src[b]; st[e] = DONE :: else -> wipe(e) fi }
#endif

#ifdef DELTA
#ifdef LOOSEN_10a
#define SKRANGE(b) 1
#else
#define SKRANGE(b) (!HELD(b))
#endif
#ifdef LOOSEN_10c
#define SKGEN(b) 1
#else
#define SKGEN(b) (((gen[0] | gen[1]) & B(b)) == 0)
#endif
#ifdef LOOSEN_10b
#define ASKED(b) received(b); hv[b] = hd[b] + 1
#define ASKSTREAM 1
#else
#define ASKED(b) hv[b] = td[b] + 1
#define ASKSTREAM NEWSTREAM
#endif
#ifdef LOOSEN_10e
#define HOLE(b) || CLS(src[b]) == 0
#else
#define HOLE(b)
#endif
inline received(b) {
	hd[b] = td[b]; i = 0;
	do
	:: i < r ->
		if :: (lr[i] >> 6) == 0 && ((lr[i] >> 4) & 1) == b -> hd[b] = lr[i] & 15 :: else fi;
		i++
	:: else -> break
	od; i = 0
}
#define SKIP(b) \
	:: d_step { SERVED && srv && !BUSY && (unsh & B(b)) && hv[b] == 0 && ASKSTREAM && (ASKGEN(b)) -> ASKED(b) } \
	:: d_step { SERVED && srv && !BUSY && (unsh & B(b)) && hv[b] != 0 && SKRANGE(b) && SKGEN(b) && (CLS(hv[b] - 1) == CLS(src[b]) HOLE(b)) -> \
		unsh = unsh & ~B(b); hv[b] = 0; SKIPPED(b); DIDSKIP }
#ifdef CANARY_skip
#define DIDSKIP assert(false)
#else
#define DIDSKIP skip
#endif
#ifdef LOOSEN_10c
#define ASKGEN(b) 1
#else
#define ASKGEN(b) (((gen[0] | gen[1]) & B(b)) == 0 && ASKGAP)
#endif
/* where no generation tells of what the target may still take, the gap's begin does */
#ifdef LOOSEN_10f
#define ASKGAP 1
#else
#define ASKGAP (begun && !AHEAD(0) && !AHEAD(1) && !AHEAD(2) && !AHEAD(3) && !AHEAD(4) && !AHEAD(5) && !AHEAD(6) && !AHEAD(7))
#endif
#define AHEAD(n) (h > (n) && (lr[n] >> 5) == GB)
/* equal bytes: from here on they are the same write */
#define SKIPPED(b) if :: CLS(td[b]) == CLS(src[b]) -> td[b] = src[b] :: else fi
#else
#define SKIP(b)
#endif

#ifdef MOVED
/* what is in flight is marked again: its record comes behind the gap's begin */
#ifdef LOOSEN_12c
#define AGAIN(e) skip
#else
#define AGAIN(e) if :: COUNTS(e, ge[e]) -> gen[ge[e]] = gen[ge[e]] | B(bl[e]) :: else fi
#endif
#define MOVEGEN gen[0] = 0; gen[1] = 0; AGAIN(0); AGAIN(1);
#else
#define MOVEGEN
#endif
/* a new stream starts when the target has synced or cut what it held */
#ifdef LOOSEN_11
#define NEWSTREAM 1
#else
#define NEWSTREAM (s == 0)
#endif
/* the target accepts a jump at gap-begin only */
#if defined(LOOSEN_8c) || defined(LOOSEN_12b)
#define FOLLOWS 1
#else
#define FOLLOWS (jp != r + 1 || (lr[r] >> 5) == GB)
#endif
#ifdef LOOSEN_6c
#define NONELEFT 1
#else
#define NONELEFT (unsh == 0)
#endif
#ifdef LOOSEN_6d
#define ENDROOM (ROOM >= 1)
#define ENDRESERVE skip
#else
#define ENDROOM (ROOM >= 2)
#define ENDRESERVE rsv = 1
#endif

#ifdef LOOSEN_5b
#define NOFLIGHT(g) 1
#else
#define NOFLIGHT(g) (!COUNTS(0, g) && !COUNTS(1, g))
#endif
#ifdef LOOSEN_5a
#define SEALED(g) 1
#else
#define SEALED(g) (op != (g))
#endif
#ifdef LOOSEN_5c
#define COVERED(g) (lastq[g] <= r)
#else
#ifdef LOOSEN_13a
#define COVERED(g) (lastq[g] <= sp)
#else
#define COVERED(g) (lastq[g] == 0)
#endif
#endif
#define CLEAR(g) \
	:: d_step { up && gen[g] != 0 && SEALED(g) && NOFLIGHT(g) && COVERED(g) -> gen[g] = 0; lastq[g] = 0 }

#ifdef LOOSEN_5d
#define MOVE(e) skip
#else
#define MOVE(e) if :: COUNTS(e, 1 - op) -> ge[e] = op :: else fi
#endif

/* what becomes of submitted I/O when its process or host dies */
#define FATE(e) \
	if \
	:: st[e] == SUBM -> skip \
	:: st[e] == SUBM -> src[bl[e]] = va[e]; wrote(bl[e]) \
	:: st[e] == SUBM -> src[bl[e]] = va[e] - 1; wrote(bl[e]) \
	ZOMBIE(e) \
	:: else \
	fi
#ifdef LOOSEN_7b
#define ZOMBIE(e) :: st[e] == SUBM && zv == 0 -> zb = bl[e]; zv = va[e]
#else
#define ZOMBIE(e)
#endif

#ifdef LOOSEN_2a
#define JUDGED(e) (st[e] == HEAD || st[e] == SEQD)
#else
#define JUDGED(e) (st[e] == HEAD)
#endif
#ifdef LOOSEN_7a
#define REPLAY(e) wipe(e)
#else
#define REPLAY(e) kd[e] = KR; va[e] = src[bl[e]]; st[e] = DONE; srv = 0
#endif
#ifdef LOOSEN_6e
#define ENDJUDGED skip
#else
#define ENDJUDGED flag = 0; begun = 0
#endif
#define RESTART(e) \
	if \
	:: st[e] == FREE -> skip \
	:: st[e] == MARK || kd[e] == KC || kd[e] == KU || st[e] == LATE || JUDGED(e) -> wipe(e) \
	:: else -> REPLAY(e) \
	fi

inline reset_filter() {
	wipe(0); wipe(1); gst = 0; gen[0] = 0; gen[1] = 0; lastq[0] = 0; lastq[1] = 0; op = 0
#ifdef DELTA
	; hv[0] = 0; hv[1] = 0
#endif
}

#ifdef POWER
inline revert(b) {
	if
	:: src[b] != sd[b] -> src[b] = sd[b]
	:: sd[b] = src[b]
	fi;
	if :: ack[b] > src[b] -> ack[b] = src[b] :: else fi;
	fph[b] = 0; cph[b] = 0
}
#ifdef LOOSEN_8a
#define SURVIVED ckd
#else
#ifdef LOOSEN_8b
#define SURVIVED wi
#else
#define SURVIVED (ckd | wi)
#endif
#endif
#ifdef LOOSEN_9b
#define QUIET(b) 1
#else
#define QUIET(b) (!HELD(b))
#endif
#ifdef LOOSEN_9f
#define FLUSHED(b) 1
#else
#define FLUSHED(b) (fph[b] == 2)
#endif
#ifdef LOOSEN_9d
#define CKPTED(b) (cph[b] >= 1)
#else
#define CKPTED(b) (cph[b] == 2)
#endif
#ifdef CANARY_leave
#define LEFT assert(false)
#else
#define LEFT skip
#endif
#define LEAVE(b) \
	:: d_step { up && (wi & B(b)) && QUIET(b) && FLUSHED(b) && CKPTED(b) -> wi = wi & ~B(b); fph[b] = 0; cph[b] = 0; LEFT }
#define NEED(ph, v) (((wi & 1) && ph[0] == v) || ((wi & 2) && ph[1] == v))
#endif

init {
	atomic {
		/* budgets are chosen first, so that "nothing more can happen" is
		 * tested with and without the faults still to come */
		nw = NW;
		if :: kills = NK :: NK > 0 -> kills = 0 fi;
		if :: cuts = NC :: NC > 0 -> cuts = 0 fi;
		powers = NP; fails = NF; merges = NM; losses = NL;
		if :: skip :: NW > 1 && NK + NP > 0 -> powers = 0; fails = 0; losses = 0 fi
	}
	do
	:: atomic {
		if
		WRITE(0, 0) WRITE(0, 1) WRITE(1, 0) WRITE(1, 1)
		COMMAND(0) COMMAND(1)
		COPY(0, 0) COPY(0, 1) COPY(1, 0) COPY(1, 1)
		SKIP(0) SKIP(1)
#ifdef LOOSEN_4b
		:: d_step { up && st[0] == LATE -> unsh = unsh & ~B(bl[0]); wipe(0) }
		:: d_step { up && st[1] == LATE -> unsh = unsh & ~B(bl[1]); wipe(1) }
#endif
#ifdef LOOSEN_7b
		:: d_step { zv != 0 -> src[zb] = zv; zb = 0; zv = 0 }
#endif
		/* a read shows the guest what the block holds */
		:: d_step { SERVED && NOTHELD(0) && !BUSY && ack[0] < src[0] -> ack[0] = src[0] }
		:: d_step { SERVED && NOTHELD(1) && !BUSY && ack[1] < src[1] -> ack[1] = src[1] }

		/* gap-begin: the next record after the flag */
		:: d_step { up && flag && !begun && !BUSY && CREDIT -> assert(rsv); rsv = 0; gst = 1 }
		:: d_step { up && gst == 1 -> append(GB, 0, 0); gst = 2 }
		:: d_step { up && gst == 2 -> begun = 1; gst = 0 }
		/* gap-end: a slot for it and a fresh reserve */
		:: d_step { up && srv && flag && begun && !BUSY && CREDIT && NONELEFT && ENDROOM -> gst = 3; ENDRESERVE }
		:: d_step { up && gst == 3 -> append(GE, 0, 0); gst = 4 }
		:: d_step { up && gst == 4 -> flag = 0; begun = 0; gst = 0;
#ifdef CANARY_gapend
			assert(false);
#endif
			skip }

#ifdef CANARY_cycle
		:: d_step { up && begun -> skip }
#endif
		/* generations */
		:: d_step { up && !BUSY && gen[op] != 0 && gen[1 - op] == 0 -> op = 1 - op; lastq[op] = 0 }
		CLEAR(0) CLEAR(1)
		:: d_step { up && !BUSY && merges > 0 && gen[op] != 0 && gen[1 - op] != 0 -> merges--;
			gen[op] = gen[op] | gen[1 - op];
			if :: lastq[1 - op] > lastq[op] -> lastq[op] = lastq[1 - op] :: else fi;
			MOVE(0); MOVE(1);
			gen[1 - op] = 0; lastq[1 - op] = 0 }

#ifndef NONET
		/* network and target */
		:: d_step { r < h && NEWSTREAM && FOLLOWS -> r++ }
		:: d_step { r > 0 -> /* log[0] becomes durable */
			if
			:: (lr[0] >> 5) == GB -> tgap = 1
			:: (lr[0] >> 5) == GE -> tgap = 0
			:: else -> td[(lr[0] >> 4) & 1] = lr[0] & 15
			fi;
			if
			:: !tgap -> assert(ls[0] == 255 || (td[0] >= (ls[0] >> 4) && td[1] >= (ls[0] & 15)))
			:: else
			fi;
			r--; pop();
#ifdef CANARY_durable
			assert(td[0] != 2 * NW);
#endif
			skip }
		:: d_step { cuts > 0 && r > 0 -> cuts--; r = 0;
			do :: s > 0 -> pop() :: else -> break od; skip }
		/* after a power loss the target may also cut what it holds above durable */
		:: d_step { s > 0 -> r = 0; do :: s > 0 -> pop() :: else -> break od; skip }
#endif
#ifdef SPILL
		/* the oldest record of the ring is safe on the source's disk: its slot is free */
		:: d_step { up && GONE < h && GONE < SPILL -> sp = GONE + 1;
#ifdef CANARY_spill
			assert(sp < 2 || NW - nw < RC);
#endif
			skip }
#endif
#if NL > 0
		/* a hole: the source has lost all it had not shipped, or all but the beginning of what
		 * it had spilled */
#ifdef SPILL
		:: d_step { up && !BUSY && losses > 0 && sp > r + 1 -> losses--;
			truncate(r + 1);
			unsh = unsh | gen[0] | gen[1];
			if :: gen[0] | gen[1] -> touched(0); touched(1) :: else fi;
			MOVEGEN
#ifndef LOOSEN_13c
			flag = 1; begun = 0; rsv = 1;
#endif
			jp = r + 2 }
#endif
		:: d_step { up && !BUSY && losses > 0 && h > r -> losses--;
			truncate(r);
#ifndef LOOSEN_12a
			unsh = unsh | gen[0] | gen[1];
			if :: gen[0] | gen[1] -> touched(0); touched(1) :: else fi;
			MOVEGEN
#endif
#ifndef LOOSEN_12b
			flag = 1; begun = 0; rsv = 1;
#endif
			jp = r + 1 }
#endif
#if NK > 0
		/* kill of the filter: shared memory stays, its I/O ends before a successor */
		:: atomic { up && kills > 0 -> kills--; up = 0; FATE(0); FATE(1) }
		:: d_step { !up -> up = 1; srv = 1; 
			RESTART(0); RESTART(1);
			if :: gst == 2 -> begun = 1 :: gst == 4 -> ENDJUDGED :: else fi;
			gst = 0;
#ifdef LOOSEN_13b
			/* what was released counts as durable */
			if :: lastq[1 - op] <= sp -> gen[1 - op] = 0; lastq[1 - op] = 0 :: else fi;
#endif
			rsv = (flag && begun -> 0 : 1);
#ifdef DELTA
			hv[0] = 0; hv[1] = 0;
#endif
#ifdef CANARY_replay
			assert(srv);
#endif
			skip }
		:: d_step { up && !srv && kd[0] != KR && kd[1] != KR -> srv = 1 }
#endif
#ifdef POWER
		/* backing flush, checkpoint, write-intent */
		:: d_step { up && !flrun && NEED(fph, 0) -> flrun = 1;
#ifdef LOOSEN_9c
			fdur = 0;
#endif
			if :: fph[0] == 0 -> fph[0] = 1 :: else fi; if :: fph[1] == 0 -> fph[1] = 1 :: else fi }
		:: d_step { up && flrun -> flrun = 0;
#ifdef LOOSEN_9c
			if :: fph[0] == 1 -> fph[0] = 2; if :: !(fdur & 1) -> sd[0] = src[0] :: else fi :: else fi;
			if :: fph[1] == 1 -> fph[1] = 2; if :: !(fdur & 2) -> sd[1] = src[1] :: else fi :: else fi;
			fdur = 0
#else
			if :: fph[0] == 1 -> fph[0] = 2; sd[0] = src[0] :: else fi;
			if :: fph[1] == 1 -> fph[1] = 2; sd[1] = src[1] :: else fi
#endif
			}
#ifdef LOOSEN_9e
		/* generations copied first, unshipped later */
		:: d_step { up && ckrun == 0 && (NEED(cph, 0) || ckd != (gen[0] | gen[1] | unsh)) -> ckrun = 1; ckg = gen[0] | gen[1];
			if :: cph[0] == 0 -> cph[0] = 1 :: else fi; if :: cph[1] == 0 -> cph[1] = 1 :: else fi }
		:: d_step { up && ckrun -> ckrun = 0; ckd = ckg | unsh; ckg = 0;
#else
		:: d_step { up && ckrun == 0 && (NEED(cph, 0) || ckd != (gen[0] | gen[1] | unsh)) -> ckrun = 1; ckb = gen[0] | gen[1] | unsh;
			if :: cph[0] == 0 -> cph[0] = 1 :: else fi; if :: cph[1] == 0 -> cph[1] = 1 :: else fi }
		:: d_step { up && ckrun -> ckrun = 0; ckd = ckb; ckb = 0;
#endif
			if :: cph[0] == 1 -> cph[0] = 2 :: else fi; if :: cph[1] == 1 -> cph[1] = 2 :: else fi }
		LEAVE(0) LEAVE(1)
		:: d_step { up && credit == 0 -> credit = 2;
#ifdef LOOSEN_8d
			over = 0;
#endif
			skip }
		:: atomic { powers > 0 -> powers--;
			FATE(0); FATE(1); revert(0); revert(1);
			d_step {
#ifdef LOOSEN_8d
				/* a sequence number that the target has seen is given again */
				assert(over == 0 || r + over <= h);
				over = 0;
#endif
				reset_filter();
#ifdef SPILL
				if :: sp > r -> truncate(sp); s = 0 :: else -> truncate(r); s = r fi;
				jp = h + 1;
#else
				truncate(r); s = r; jp = r + 1;
#endif
				up = 1; srv = 1; flrun = 0; ckrun = 0; ckb = 0; credit = 2; rsv = 1;
				unsh = SURVIVED;
				begun = 0;
#ifdef LOOSEN_8c
				flag = 0
#else
				flag = 1
#endif
#ifdef CANARY_power
				; assert(unsh == 0 || s == 0)
#endif
			} }
#endif
		/* nothing more can happen: everything is settled, every gap has ended */
		:: else ->
#ifdef CANARY_end
			assert(false);
#endif
			assert(up && nw == 0);
			assert(!HELD(0) && !HELD(1));
#ifndef NONET
			assert(st[0] == FREE && st[1] == FREE);
			assert(!flag && !begun && rsv && !tgap && unsh == 0);
			assert(gen[0] == 0 && gen[1] == 0 && h == 0);
			assert(src[0] == td[0] && src[1] == td[1]);
#endif
			goto end
		fi;
		d_step { invariants() }
	   }
	od;
end:	skip
}
