//! Access to a conntrack entry that other CPUs and user space read and write at the same time.

use core::ptr::NonNull;

use palisade_abi::CtEntry;

/// A value of the CONNTRACK map.
///
/// Programs on two CPUs can handle packets of one flow at once, so a reference would alias. Each access reads or writes
/// one field by one volatile load or store. A read-modify-write is not atomic: the update of the other CPU can be lost.
/// Counters and times tolerate that; [`CtEntry::decided`] protects the decisions of an inspector.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Entry(NonNull<CtEntry>);

macro_rules! fields {
    ($($field:ident, $set:ident: $type:ty;)*) => {
        $(
            #[doc = concat!("Returns [`CtEntry::", stringify!($field), "`].")]
            #[inline(always)]
            pub fn $field(self) -> $type {
                // SAFETY: `Entry::new` got a pointer to a map value, which stays readable while the program runs. The
                // field is aligned; the read is volatile because other CPUs can write it.
                unsafe { core::ptr::read_volatile(&raw const (*self.as_ptr()).$field) }
            }

            #[doc = concat!("Sets [`CtEntry::", stringify!($field), "`].")]
            #[inline(always)]
            pub fn $set(self, value: $type) {
                // SAFETY: `Entry::new` got a pointer to a map value, which stays writable while the program runs. The
                // field is aligned and any bytes are a valid value; the write is volatile because other CPUs can read
                // it.
                unsafe { core::ptr::write_volatile(&raw mut (*self.as_ptr()).$field, value) }
            }
        )*
    };
}

macro_rules! read_only_fields {
    ($($field:ident: $type:ty;)*) => {
        $(
            #[doc = concat!("Returns [`CtEntry::", stringify!($field), "`].")]
            #[inline(always)]
            pub fn $field(self) -> $type {
                // SAFETY: `Entry::new` got a pointer to a map value, which stays readable while the program runs. The
                // field is aligned; the read is volatile because other CPUs can count packets and the kernel can give
                // the element to another flow.
                unsafe { core::ptr::read_volatile(&raw const (*self.as_ptr()).$field) }
            }
        )*
    };
}

impl Entry {
    /// Returns the entry at `at`; `None` if the pointer is null.
    ///
    /// # Safety
    /// `at` is null or points to a value of the CONNTRACK map that the running program looked up. Such a value stays
    /// readable and writable until the program ends (RCU). If the kernel gives the element to another flow before that,
    /// reads return values of that flow and writes change its entry; [`CtEntry::serial`] distinguishes the two flows.
    #[inline(always)]
    pub unsafe fn new(at: *mut CtEntry) -> Option<Self> {
        // This compiles to no branch, because `Option<NonNull>` is a nullable pointer. LLVM would duplicate all code
        // between a branch here and the next one.
        NonNull::new(at).map(Self)
    }

    /// Returns the pointer, for a call of a global function.
    #[inline(always)]
    pub fn as_ptr(self) -> *mut CtEntry {
        self.0.as_ptr()
    }

    read_only_fields! {
        created: u64;
        forward_packets: u64;
        forward_bytes: u64;
        reply_packets: u64;
        reply_bytes: u64;
    }

    fields! {
        expires, set_expires: u64;
        reported, set_reported: u64;
        revision, set_revision: u32;
        rule, set_rule: u32;
        remote_identity, set_remote_identity: u32;
        flags, set_flags: u8;
        forward_tcp, set_forward_tcp: u8;
        reply_tcp, set_reply_tcp: u8;
        match_kind, set_match_kind: u8;
        serial, set_serial: u32;
        ruleset, set_ruleset: u32;
        inspector, set_inspector: u8;
        punt_flags, set_punt_flags: u8;
        over, set_over: u8;
        protected, set_protected: u8;
        decided, set_decided: u64;
    }

    /// Counts a packet of `length` bytes in one direction.
    #[inline(always)]
    pub fn count(self, reply: bool, length: u32) {
        let entry = self.as_ptr();
        // SAFETY: `Entry::new` got a pointer to a map value, which stays readable and writable while the program runs.
        // The fields are aligned; the accesses are volatile because other CPUs can access them.
        unsafe {
            let (packets, bytes) = if reply {
                (&raw mut (*entry).reply_packets, &raw mut (*entry).reply_bytes)
            } else {
                (&raw mut (*entry).forward_packets, &raw mut (*entry).forward_bytes)
            };
            core::ptr::write_volatile(packets, core::ptr::read_volatile(packets) + 1);
            core::ptr::write_volatile(bytes, core::ptr::read_volatile(bytes) + u64::from(length));
        }
    }

    /// Returns whether the inspector has offloaded the connection under the rules in force.
    #[inline(always)]
    pub fn is_offloaded(self) -> bool {
        self.decided() == CtEntry::offload(self.serial(), self.ruleset(), self.punt_flags())
    }

    /// Returns the offload window of a direction: the first sequence number in it, and the first one after it.
    #[inline(always)]
    pub fn window(self, reply: bool) -> (u32, u32) {
        // SAFETY: `Entry::new` got a pointer to a map value, which stays readable while the program runs. Both bounds
        // lie together at a multiple of eight bytes: one load never sees one old and one new bound. The read is
        // volatile because other CPUs can write them.
        let word = unsafe {
            let at = &raw const (*self.as_ptr()).windows[if reply { 2 } else { 0 }];
            core::ptr::read_volatile(at.cast::<u64>())
        }
        .to_ne_bytes();
        (
            u32::from_ne_bytes([word[0], word[1], word[2], word[3]]),
            u32::from_ne_bytes([word[4], word[5], word[6], word[7]]),
        )
    }

    /// Returns the four words of [`palisade_abi::ProxyPath`] of an intercepted flow.
    #[inline(always)]
    pub fn path(self) -> [u32; 4] {
        let ((a, b), (c, d)) = (self.window(false), self.window(true));
        [a, b, c, d]
    }

    /// Sets the offload windows of both directions, each by one store.
    #[inline(always)]
    pub fn set_windows(self, windows: [u32; 4]) {
        for at in [0, 2] {
            let (from, to) = (windows[at].to_ne_bytes(), windows[at + 1].to_ne_bytes());
            let word = u64::from_ne_bytes([from[0], from[1], from[2], from[3], to[0], to[1], to[2], to[3]]);
            // SAFETY: `Entry::new` got a pointer to a map value, which stays writable while the program runs. Both
            // bounds lie together at a multiple of eight bytes, so one store changes both. The write is volatile
            // because other CPUs can read them.
            unsafe { core::ptr::write_volatile((&raw mut (*self.as_ptr()).windows[at]).cast::<u64>(), word) };
        }
    }
}
