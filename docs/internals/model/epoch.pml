/*
 * epoch.pml: epochs and fencing (invariant 11), and reads by ancestry.
 *
 * A is the protected VM's source.  A failover at any durable point starts B
 * from a view and raises the epoch; commit raises it again; rollback raises it
 * and gives the group back to A, with the end of A's last epoch as parent.  A
 * may be cut off at any time and its last frame may arrive at any later time.
 * The target may crash.  Record (e, q) has seq q; epoch e has the parent
 * position (ped[e], par[e]).  Appends are durable at once.
 */
#define NE 5
#define NQ 3
#define A 1
#define B 2

byte te = 1;                 /* epoch that the target accepts, in memory */
byte dte = 1;                /* the same, durable */
byte newest = 1;             /* ghost: newest epoch in which a VM was started or let go on */
byte ped[NE]; byte par[NE]; byte top[NE]; byte who[NE];
byte truth[NE];              /* ghost: what a reader at the end of epoch e must see; A: bits 0..2, B: bits 3..5 */
byte ae = 1; byte aw; byte aacked; byte apos; bit fenced;
bit con; byte sess;          /* A's session; epoch accepted at its hello */
byte we; byte wq;            /* A's frame on the wire */
bit failed; byte base;       /* a failover is running; A's last epoch */
byte crashes = 2;
hidden byte e; hidden byte q; hidden byte m; hidden byte lim;

#define BIT(w, s) (1 << ((s) - 1 + ((w) == B -> NQ : 0)))
#define UPTO(s) (((1 << (s)) - 1) | (((1 << (s)) - 1) << NQ))

inline visible(at) {         /* m = records that a reader at the end of epoch `at` finds */
	m = 0;
#ifdef LOOSEN_e4
	/* every record at or below the point, of whatever epoch */
	e = 1;
	do
	:: e <= te ->
		q = par[e] + 1;
		do :: q <= top[e] && q <= top[at] -> m = m | BIT(who[e], q); q++ :: else -> break od;
		e++
	:: else -> break
	od;
#else
	e = at; lim = top[at];
	do
	:: e > 0 ->
		q = par[e] + 1;
		do :: q <= lim -> m = m | BIT(who[e], q); q++ :: else -> break od;
		if :: par[e] < lim -> lim = par[e] :: else fi;
		e = ped[e]
	:: else -> break
	od;
#endif
	e = 0; q = 0; lim = 0
}

inline raise(w, p, s) {      /* epoch te + 1 of writer w, parent (p, s) */
	ped[te + 1] = p; par[te + 1] = s; top[te + 1] = s; who[te + 1] = w;
	truth[te + 1] = truth[p] & UPTO(s);
	te++; newest = te
}

#ifdef LOOSEN_e2
#define PERSIST skip         /* the VM is started before the epoch is durable */
#else
#define PERSIST dte = te
#endif
#ifdef LOOSEN_e1
#define ACCEPT (con && we == sess)   /* the epoch is looked at in hello only */
#else
#define ACCEPT (we == te)
#endif
#ifdef LOOSEN_e3
#define BACKTO s             /* parent: the point of the failover */
#else
#define BACKTO top[base]
#endif

init {
	byte s;
	who[1] = A;
	do
	:: atomic {
		if
		:: d_step { aw < NQ -> aw++ }                       /* its guest writes, connected or not */
		:: d_step { con -> con = 0 }
		/* hello: A learns the epoch before it ships */
		:: d_step { !con && !fenced && (te > ae || aw > aacked) ->
			con = 1;
			if
			:: who[te] == A ->
				ae = te; apos = top[te] + 1; sess = te
			:: else ->
#ifdef LOOSEN_e5
				/* it ships under the newest epoch that it hears of */
				ae = te; apos = top[te] + 1; sess = te
#else
				fenced = 1; con = 0;
#ifdef CANARY_fenced
				assert(false);
#endif
				skip
#endif
			fi }
		/* a fenced source asks again: after a rollback it is let in */
		:: d_step { fenced && who[te] == A -> fenced = 0 }
		:: d_step { con && !fenced && we == 0 && apos <= aw -> we = ae; wq = apos; apos++ }
		:: d_step { we != 0 ->
			if
			:: ACCEPT && wq == top[we] + 1 ->
				/* one accepted writer */
				assert(we == newest && who[we] == A);
				top[we] = wq; truth[we] = truth[we] | BIT(A, wq);
				if :: con && ae == we && wq > aacked -> aacked = wq :: else fi
			:: else
			fi;
			we = 0; wq = 0 }
		/* B writes */
		:: d_step { failed && who[te] == B && top[te] < NQ -> top[te]++;
			truth[te] = truth[te] | BIT(B, top[te]) }
		/* failover at a point of the present epoch */
		:: atomic { !failed && who[te] == A && te + 2 < NE ->
			if :: s = top[te] :: top[te] > par[te] -> s = top[te] - 1 fi;
			d_step { base = te; failed = 1; raise(B, te, s); PERSIST; s = par[te] } }
		:: d_step { failed && te + 1 < NE && te == base + 1 -> s = 0; raise(B, te, top[te]); PERSIST; failed = 1; base = 0
#ifdef CANARY_failover
			; assert(truth[te] != (1 | (2 << NQ)))
#endif
		   }
		:: d_step { failed && base != 0 && te + 1 < NE && te == base + 1 ->
			raise(A, base, BACKTO); PERSIST; failed = 0; base = 0; s = 0
#ifdef CANARY_takeover
			; assert(par[te] < 2 || fenced == 0)
#endif
		   }
#ifdef LOOSEN_e2
		:: d_step { dte < te -> dte = te }
#endif
		:: d_step { crashes > 0 -> crashes--; con = 0; te = dte }
		:: else ->
#ifdef CANARY_end
			assert(false);
#endif
			/* the accepted writer has shipped all; a refused one knows it */
			assert(who[te] != A || aacked == NQ);
			assert(who[te] == A || fenced || aacked == aw);
			goto end
		fi;
		d_step {
			visible(te);
			assert(te != newest || m == truth[te]);      /* abandoned writes never show */
			/* what A counts as durable is in the chain that it goes on */
			assert(te != newest || who[te] != A || ae != te || (truth[te] & ((1 << aacked) - 1)) == (1 << aacked) - 1);
			m = 0
		}
	   }
	od;
end:	skip
}
