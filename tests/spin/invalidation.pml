/*
 * How a guest page fault notices that host memory changed under it: the sequence, the count of invalidations that run,
 * and their range (mmu_invalidate_seq, mmu_invalidate_in_progress, mmu_invalidate_range_start and _end). A model of its
 * own beside kvmfault.explore, which explores the same protocol on the path's code; tests/spin compares the verdicts.
 *
 * What is modelled, by -D:
 *   VCPUS, ACCESSES, NOTIFIERS   how many. vCPU n accesses frame n, then the next one ..., each time until it can;
 *                notifier n invalidates frame n. Frames are numbered modulo 2.
 *   BLOCK        the host's area begins as one block of both frames; notifier 0 makes it an area of pages
 *   PLAIN        the test under the lock does not look at the range (mmu_invalidate_retry); else mmu_invalidate_retry_gfn
 *   PRECHECK     faults also look without the lock (mmu_invalidate_retry_gfn_unsafe)
 *   FRAME_LOCK   faults test under the lock of the frame, which zapping takes too, and not under mmu_lock: as powerpc
 *                does with hashed page tables, under the lock of the reverse map. Only with PLAIN.
 *   WEAK         what no barrier orders may happen in any order
 * The mutants are NO_RECHECK, LATE_SAMPLE, SAMPLE_AFTER_AREA, NO_SEQUENCE, NO_COUNT, ONE_FLAG, LAST_RANGE, INT_SEQUENCE,
 * NO_FLUSH and, of barriers, NO_RMB (sample | page), NO_WMB (sequence | count), NO_TEST_RMB (count | sequence).
 *
 * Mistakes are found by assertions: no vCPU translates to a page that the host took back, and a fault that nobody
 * disturbed ends.
 */
#ifndef VCPUS
#define VCPUS 2
#endif
#ifndef ACCESSES
#define ACCESSES 1
#endif
#ifndef NOTIFIERS
#define NOTIFIERS 2
#endif
#define FRAMES 2

/* Pages are told apart by who gave them: 1, 2 are the first ones of the frames; 0 is none, FOREIGN is another guest's. */
#define NONE    0
#define FIRST(gfn)      (1 + (gfn))
#define MOVED(n, gfn)   (1 + FRAMES * (1 + (n)) + (gfn))
#define FOREIGN         (1 + FRAMES * (1 + NOTIFIERS))
#define PAGES           (FOREIGN + 1)

#ifdef INT_SEQUENCE
#define SEQUENCE_0  127                                  /* one before the sign bit of the copy, which has 8 bits */
#define KEPT(s)     ((s) > 127 -> (s) - 256 : (s))
#else
#define SEQUENCE_0  0
#define KEPT(s)     (s)
#endif

short seq = SEQUENCE_0;
byte in_progress;
byte range_start, range_end;

byte readers;                   /* of mmu_lock */
bool writer;
byte held[FRAMES];              /* locks of the frames: faults that hold them */
byte mmap_readers;
bool mmap_writer;

byte host[FRAMES];              /* the host's page table */
bool block;                     /* its area maps both frames as one */
byte entry[FRAMES];             /* the guest's second-stage table */
typedef Tlb { byte page[FRAMES] };
Tlb tlb[VCPUS];
bool gone[PAGES];               /* the host took it back: it may be anybody's */
byte ended;                     /* notifiers that have nothing left to do */

#define may_reach(p)    ((p) == NONE || !gone[p])

inline nobody_reaches_what_is_gone() {
    for (i : 0 .. FRAMES - 1) {
        assert(may_reach(entry[i]));
        for (j : 0 .. VCPUS - 1) {
            assert(may_reach(tlb[j].page[i]))
        }
    }
    i = 0; j = 0
}

/* The fault. */

inline sample() {
    atomic { kept = KEPT(seq); undisturbed = (ended == NOTIFIERS) }
}

inline obtain_page() {
    page = host[gfn]
}

/* Without the lock, so it may see anything; what it lets pass is tested again. */
#ifdef PRECHECK
#define LOOK_EARLY \
    if \
    :: in_progress != 0 && range_start <= gfn && gfn < range_end || seq != kept -> assert(!undisturbed); goto retry \
    :: else \
    fi;
#else
#define LOOK_EARLY
#endif

inline sample_then_page() {
#if defined(LATE_SAMPLE)
    obtain_page(); sample(); LOOK_EARLY skip
#elif defined(NO_RMB) && defined(WEAK)
    if
    :: sample(); LOOK_EARLY obtain_page()
    :: obtain_page(); sample(); LOOK_EARLY skip
    fi
#else
    sample(); LOOK_EARLY obtain_page()
#endif
}

#ifdef PLAIN
#define RUNS_HERE   (in_progress != 0)
#else
#define RUNS_HERE   (in_progress != 0 && range_start <= gfn && gfn < range_end)
#endif

inline test() {
#if defined(NO_RECHECK)
    stale = false
#elif defined(FRAME_LOCK)
#if defined(NO_TEST_RMB) && defined(WEAK)
    if
    :: stale = RUNS_HERE; stale = stale || seq != kept
    :: stale = seq != kept; stale = stale || RUNS_HERE
    fi
#else
    stale = RUNS_HERE;
    stale = stale || seq != kept
#endif
#else
    stale = RUNS_HERE || seq != kept            /* whoever changes either holds mmu_lock for write */
#endif
}

inline lock_for_fault() {
#ifdef FRAME_LOCK
    held[gfn]++
#else
    atomic { !writer -> readers++ }
#endif
}

inline unlock_of_fault() {
#ifdef FRAME_LOCK
    held[gfn]--
#else
    readers--
#endif
}

inline install() {
    d_step {
        if
        :: whole ->                             /* what is next to a page belongs to the guest only in a block */
           entry[gfn] = page;
           entry[1 - gfn] = (from_block -> page + 1 - 2 * gfn : FOREIGN)
        :: else -> entry[gfn] = page
        fi;
        nobody_reaches_what_is_gone()
    }
}

proctype vcpu(byte me) {
    byte gfn, page, left = ACCESSES, i, j;
    short kept;
    bool whole, from_block, stale, undisturbed;

access:
    if
    :: left == 0 -> goto done
    :: else -> gfn = (me + ACCESSES - left) % FRAMES
    fi;

again:
    /* the hardware: a translation that it keeps, or a walk, or a fault */
    if
    :: d_step { tlb[me].page[gfn] != NONE -> left--; gfn = 0 }
       goto access
    :: d_step { tlb[me].page[gfn] == NONE && entry[gfn] != NONE -> tlb[me].page[gfn] = entry[gfn] }
       goto again
    :: tlb[me].page[gfn] == NONE && entry[gfn] == NONE
    fi;

#ifdef BLOCK
    atomic { !mmap_writer -> mmap_readers++ }
    whole = block;
#ifdef SAMPLE_AFTER_AREA
    mmap_readers--;
    sample();
#else
    sample();
    mmap_readers--;
#endif
    LOOK_EARLY
    atomic { obtain_page(); from_block = block }
#else
    sample_then_page();
#endif

    lock_for_fault();
    test();
    if
    :: stale ->
       unlock_of_fault();
       assert(!undisturbed)
    :: else ->
       install();
       unlock_of_fault()
    fi;
retry:
    atomic { page = 0; kept = 0; whole = false; from_block = false; stale = false; undisturbed = false }
    goto again;
done:
    skip
}

/* The notifier. */

inline lock_for_write() {
    atomic {
#ifdef FRAME_LOCK
        !writer -> writer = true
#else
        !writer && readers == 0 -> writer = true
#endif
    }
}

inline begin() {
    d_step {
        if
#ifdef LAST_RANGE
        :: true -> range_start = first; range_end = last
#else
        :: in_progress == 0 -> range_start = first; range_end = last
        :: else ->
           range_start = (first < range_start -> first : range_start);
           range_end = (last > range_end -> last : range_end)
#endif
        fi
#if defined(ONE_FLAG)
        ; in_progress = 1
#elif !defined(NO_COUNT)
        ; in_progress++
#endif
    }
}

inline zap_and_flush() {
    atomic {
#ifdef FRAME_LOCK
        held[0] == 0 && held[1] == 0 ->
#endif
        for (i : first .. last - 1) {
            entry[i] = NONE
        }
        i = 0
    }
#ifndef NO_FLUSH
    d_step {
        for (i : first .. last - 1) {
            for (j : 0 .. VCPUS - 1) {
                tlb[j].page[i] = NONE
            }
        }
        i = 0; j = 0
    }
#endif
}

inline end() {
#if defined(NO_SEQUENCE)
    drop_count()
#elif defined(NO_WMB) && defined(WEAK)
    if
    :: seq++; drop_count()
    :: drop_count(); seq++
    fi
#else
    seq++;
    drop_count()
#endif
}

inline drop_count() {
#if defined(NO_COUNT)
    skip
#elif defined(ONE_FLAG)
    in_progress = 0
#else
    in_progress--
#endif
}

proctype notifier(byte me) {
    byte first = me % FRAMES, last = me % FRAMES + 1, i, j;

#ifdef BLOCK
    if
    :: me == 0 ->
       atomic { mmap_readers == 0 && !mmap_writer -> mmap_writer = true; first = 0; last = FRAMES }
    :: else ->                                          /* a block moves as a whole */
       atomic { mmap_readers == 0 && !mmap_writer -> mmap_writer = true };
       if
       :: block -> first = 0; last = FRAMES
       :: else
       fi
    fi;
#endif
    lock_for_write();
    begin();
    zap_and_flush();
    writer = false;
    d_step {                                            /* the host's own page table */
        for (i : first .. last - 1) {
            gone[host[i]] = true;
            host[i] = MOVED(me, i)
        }
        i = 0;
        if
        :: me == 0 -> block = false
        :: else
        fi;
        nobody_reaches_what_is_gone()
    }
    lock_for_write();
    end();
    writer = false;
    atomic {
#ifdef BLOCK
        mmap_writer = false;
#endif
        ended++
    }
}

init {
    byte n;
    atomic {
        for (n : 0 .. FRAMES - 1) {
            host[n] = FIRST(n)
        }
        gone[FOREIGN] = true;
#ifdef BLOCK
        block = true;
#endif
        for (n : 0 .. VCPUS - 1) {
            run vcpu(n)
        }
        for (n : 0 .. NOTIFIERS - 1) {
            run notifier(n)
        }
        n = 0
    }
}
