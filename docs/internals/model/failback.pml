/*
 * failback.pml: two sites that take turns: failover, move, reverse, failback.
 *
 * Each site has a disk of two blocks, and a store of what the other one wrote
 * (none at the first writer's).  Epochs are numbered at the store of whoever takes
 * over.  The site that took over runs the VM from a view: what is not present in
 * its disk is read from its store, and its disk, an older one, is filled in place.
 * Protecting back, the old site gives way and its store learns of the epoch; it may
 * seal what its disk holds as a base, all or a part of it, inside a gap.  Then the
 * filter gets the disks, every block is compared with that store, and what differs
 * is sent.  A record may arrive at any later time, the link may be cut, an old VM
 * may write on.  A move halts the old guest first.
 *
 * A write is a number; one record a writer may be on its way, so a second write
 * begins a gap.  Gap-begins and gap-ends are recorded, sent and durable at once.
 * Rollback, and the crash of a target, are epoch.pml's.
 *
 * Asserted: what a store offers is what the writer's disk held there (8), the VM of
 * the newest epoch reads what its line says (8), a move loses nothing and leaves
 * one VM (11), in the end the other site has everything (2).
 */
#ifndef NW
#define NW 3                                  /* guest writes */
#endif
#ifndef NT
#define NT 2                                  /* takeovers, of any kind */
#endif
#ifndef NC
#define NC 1                                  /* cuts of a session */
#endif

byte d[4]; bit pr[4];                         /* disks, and which of their blocks are right */
byte m[4]; byte v[4];                         /* stores: newest content, content of the newest point */
bit pt[2]; bit gap[2]; bit first[2];          /* there is a point; a gap is open; an epoch begins that was not followed */
byte te[2];                                   /* the newest epoch of a store; 0: no store */
byte me[2]; bit fen[2]; bit con[2];           /* the epoch that a site writes; it was refused; it has a session */
bit un[4]; byte sg[2];                        /* blocks to be sent; gap: 1 to be begun, 2 open */
byte gs[4];                                   /* ghost: a writer's disk at the record that is on its way */
byte fe[2]; byte fb[2]; byte fv[2];           /* that record: epoch (0: none), block, data */
bit vm[2]; bit vs[2];                         /* a VM uses the disk; through the view, which marks nothing */
bit halted[2]; bit th[2];                     /* the guest is halted; the store's site counts on it */
byte who[NT + 2]; byte top; bit com; bit moved;
byte g[2]; byte fk[2];                        /* ghost: what the newest line's VM must read; what it began with */
byte nw; byte nt; byte nc;

#define D(s, b) d[2 * (s) + (b)]
#define P(s, b) pr[2 * (s) + (b)]
#define M(s, b) m[2 * (s) + (b)]
#define V(s, b) v[2 * (s) + (b)]
#define U(s, b) un[2 * (s) + (b)]
#define G(s, b) gs[2 * (s) + (b)]
#define QUIET(s) (fe[s] != me[s])             /* none of its own records is on its way; an older epoch's may be */
#define IDLE(s) (!U(s, 0) && !U(s, 1))
#define READS(s, b) (P(s, b) -> D(s, b) : M(s, b))

#ifdef LOOSEN_f1
#define BEGIN 2                               /* no gap is begun before the first sync back */
#define FOLLOWED(s) first[s] = 0
#else
#define BEGIN 1
#define FOLLOWED(s) first[s] = 1
#endif
#ifdef LOOSEN_f2
#define UNUSED(s) true                        /* the old site gives way under its VM */
#else
#define UNUSED(s) !vm[s]
#endif
#ifdef LOOSEN_f3
#define UNKNOWN 0                             /* the change map of an earlier reign is believed */
#else
#define UNKNOWN 1
#endif
#ifdef LOOSEN_f5
#define ALL_HERE(s) true                      /* the epoch of a move is raised whatever is on its way */
#else
#define ALL_HERE(s) (IDLE(s) && sg[s] == 0 && QUIET(s))
#endif
#ifdef LOOSEN_f6
#define PRESENT 1                             /* an old disk is believed before it is filled */
#else
#define PRESENT 0
#endif
#ifdef LOOSEN_f7
#define BASED(s) pt[s] = 1; gap[s] = 0; V(s, 0) = M(s, 0); V(s, 1) = M(s, 1); \
	assert(V(s, 0) == fk[0] && V(s, 1) == fk[1])        /* a base counts as what was written up to the fork */
#else
#define BASED(s) gap[s] = 1
#endif
#ifdef LOOSEN_f8
#define SAME(s, b) (M(1 - (s), b) == D(s, b) || D(1 - (s), b) == D(s, b))   /* the old disk has it, its store not */
#else
#define SAME(s, b) (M(1 - (s), b) == D(s, b))
#endif
#ifdef LOOSEN_f9
#define ACCEPTS(t, s) (te[t] != 0 && who[te[t]] == s)       /* the site is looked at, not the epoch */
#else
#define ACCEPTS(t, s) (te[t] != 0 && who[te[t]] == s && fe[s] == te[t])
#endif
#ifdef LOOSEN_f10
#define LEFT(s) if :: halted[s] -> halted[s] = 0; vm[s] = 1 :: else fi      /* it goes on when nobody can be asked */
#else
#define LEFT(s) skip
#endif
#ifdef LOOSEN_f11
#define HAS(s) true                           /* the filter ships while the view still serves */
#else
#define HAS(s) !vs[s]
#endif
#ifdef LOOSEN_f12
#define FORGET(t)                             /* a halt outlives its session */
#define SAME_SESSION(s) true
#else
#define FORGET(t) th[t] = 0
#define SAME_SESSION(s) con[s]
#endif
#ifdef CANARY_base
#define CHECK_BASE(s) assert(M(s, 0) == 0)
#else
#define CHECK_BASE(s)
#endif
#ifdef CANARY_back
#define CHECK_BACK assert(top < 3)
#else
#define CHECK_BACK
#endif
#ifdef CANARY_skip
#define CHECK_SKIP(s, b) assert(D(s, b) == 0)
#else
#define CHECK_SKIP(s, b)
#endif
#ifdef CANARY_late
#define CHECK_LATE(s) assert(!(te[1 - s] >= 3 && fe[s] == 1 && who[te[1 - s]] == s))
#else
#define CHECK_LATE(s)
#endif
#ifdef CANARY_halt
#define CHECK_HALT assert(false)
#else
#define CHECK_HALT
#endif

#define TAKE(s, t) \
	nt++; top++; who[top] = t; te[t] = top; con[s] = 0; LEFT(s); th[t] = 0; gap[t] = 0; \
	assert(!vm[t]); vm[t] = 1; vs[t] = 1; P(t, 0) = PRESENT; P(t, 1) = PRESENT; \
	fk[0] = M(t, 0); fk[1] = M(t, 1); CHECK_BACK

#define WRITE(s, b) \
	:: d_step { vm[s] && nw < NW -> nw++; D(s, b) = nw; P(s, b) = 1; \
		if :: who[top] == s -> g[b] = nw :: else fi; \
		if \
		:: vs[s] || me[s] == 0                                   /* nobody records it */ \
		:: !vs[s] && me[s] != 0 && sg[s] == 0 && IDLE(s) -> U(s, b) = 1; G(s, 0) = D(s, 0); G(s, 1) = D(s, 1) \
		:: !vs[s] && me[s] != 0 && sg[s] == 0 && !IDLE(s) -> U(s, b) = 1; sg[s] = 1 \
		:: !vs[s] && me[s] != 0 && sg[s] != 0 -> U(s, b) = 1 \
		fi }

#define SEND(s, t, b) \
	:: d_step { con[s] && HAS(s) && sg[s] == 2 && QUIET(s) && U(s, b) && SAME(s, b) -> U(s, b) = 0; CHECK_SKIP(s, b) } \
	:: d_step { con[s] && HAS(s) && sg[s] == 2 && fe[s] == 0 && U(s, b) && !SAME(s, b) -> fe[s] = me[s]; fb[s] = b; fv[s] = D(s, b) } \
	:: d_step { con[s] && HAS(s) && sg[s] == 0 && fe[s] == 0 && U(s, b) -> fe[s] = me[s]; fb[s] = b; fv[s] = D(s, b) } \
	/* the view fills the disk */ \
	:: d_step { vs[s] && !P(s, b) -> D(s, b) = M(s, b); P(s, b) = 1 }

#define SITE(s, t) \
	WRITE(s, 0) WRITE(s, 1) SEND(s, t, 0) SEND(s, t, 1) \
	/* a session begins: what halted the guest did not happen; or it is refused */ \
	:: d_step { !con[s] && me[s] != 0 && HAS(s) && te[t] == me[s] -> con[s] = 1; fen[s] = 0; \
		if :: halted[s] -> halted[s] = 0; vm[s] = 1 :: else fi } \
	:: d_step { !con[s] && me[s] != 0 && te[t] != me[s] && !fen[s] -> fen[s] = 1 } \
	:: d_step { con[s] && nc < NC -> nc++; con[s] = 0; FORGET(t); LEFT(s) } \
	:: d_step { fe[s] != 0 && !con[s] -> fe[s] = 0; fv[s] = 0; fb[s] = 0 } \
	:: d_step { con[s] && HAS(s) && sg[s] == 1 && QUIET(s) -> sg[s] = 2; gap[t] = 1; first[t] = 0 } \
	:: d_step { con[s] && HAS(s) && sg[s] == 2 && QUIET(s) && IDLE(s) -> \
		sg[s] = 0; gap[t] = 0; pt[t] = 1; V(t, 0) = M(t, 0); V(t, 1) = M(t, 1); \
		assert(M(t, 0) == D(s, 0) && M(t, 1) == D(s, 1)) } \
	/* a record arrives */ \
	:: d_step { fe[s] != 0 -> \
		CHECK_LATE(s); \
		if \
		:: ACCEPTS(t, s) && !first[t] -> M(t, fb[s]) = fv[s]; \
			if \
			:: !gap[t] -> V(t, 0) = M(t, 0); V(t, 1) = M(t, 1); \
				assert(M(t, 0) == G(s, 0) && M(t, 1) == G(s, 1)) \
			:: else \
			fi; \
			if :: con[s] && me[s] == fe[s] && D(s, fb[s]) == fv[s] -> U(s, fb[s]) = 0 :: else fi \
		:: else \
		fi; \
		fe[s] = 0; fb[s] = 0; fv[s] = 0 } \
	/* t takes over by force, at its newest point */ \
	:: d_step { nt < NT && te[t] == top && who[top] == s && com && pt[t] -> \
		M(t, 0) = V(t, 0); M(t, 1) = V(t, 1); TAKE(s, t); com = 0; moved = 0; g[0] = fk[0]; g[1] = fk[1] } \
	:: d_step { !com && who[top] == s -> com = 1 } \
	/* or by a move */ \
	:: d_step { nt < NT && te[t] == top && who[top] == s && com && con[s] && HAS(s) && vm[s] && sg[s] == 0 && !th[t] -> \
		halted[s] = 1; vm[s] = 0; th[t] = 1; CHECK_HALT } \
	:: d_step { th[t] && con[s] -> th[t] = 0; halted[s] = 0; vm[s] = 1 } \
	:: d_step { nt < NT && th[t] && SAME_SESSION(s) && te[t] == top && who[top] == s && ALL_HERE(s) -> \
		V(t, 0) = M(t, 0); V(t, 1) = M(t, 1); TAKE(s, t); moved = 1; \
		assert(fk[0] == g[0] && fk[1] == g[1]) } \
	/* the stale VM is shut down */ \
	:: d_step { vm[s] && who[top] != s -> vm[s] = 0 } \
	/* s protects back: the old site gives way, and may seal a base */ \
	:: atomic { who[top] == s && com && vs[s] && P(s, 0) && P(s, 1) && te[t] != top && UNUSED(t) -> \
		d_step { me[t] = 0; con[t] = 0; fen[t] = 0; halted[t] = 0; sg[t] = 0; U(t, 0) = 0; U(t, 1) = 0 } \
		if \
		:: skip \
		:: d_step { M(t, 0) = D(t, 0); M(t, 1) = D(t, 1); BASED(t); CHECK_BASE(t) } \
		:: d_step { M(t, 0) = D(t, 0); BASED(t) }                /* cut off in the middle */ \
		:: d_step { M(t, 1) = D(t, 1); BASED(t) } \
		fi; \
		te[t] = top; FOLLOWED(t) } \
	:: d_step { who[top] == s && vs[s] && te[t] == top && me[s] != top -> \
		me[s] = top; sg[s] = BEGIN; U(s, 0) = UNKNOWN; U(s, 1) = UNKNOWN } \
	:: d_step { who[top] == s && vs[s] && me[s] == top -> vs[s] = 0 }

#ifdef LOOSEN_f4
#define RESTART(s) :: d_step { halted[s] && !vm[s] -> vm[s] = 1 }     /* a halt that no file remembers */
#else
#define RESTART(s)
#endif

init {
	byte w;
	d_step {
		top = 1; who[1] = 0; com = 1; me[0] = 1; te[1] = 1; pt[1] = 1; vm[0] = 1; con[0] = 1;
		P(0, 0) = 1; P(0, 1) = 1
	}
	do
	:: atomic {
		if
		SITE(0, 1) SITE(1, 0) RESTART(0) RESTART(1)
		:: else ->
			w = who[top];
			assert(me[w] == top && !vs[w] && !halted[w]);
			assert(IDLE(w) && sg[w] == 0 && !gap[1 - w]);
			assert(M(1 - w, 0) == g[0] && M(1 - w, 1) == g[1]);
			goto end
		fi;
		d_step {
			w = who[top];
			/* the newest line's VM reads what its line says */
			assert(!vm[w] || (READS(w, 0) == g[0] && READS(w, 1) == g[1]));
			/* after a move one VM runs */
			assert(!moved || !vm[1 - w]);
			w = 0
		}
	   }
	od;
end:	skip
}
