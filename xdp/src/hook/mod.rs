//! Access to the packet and to the program's context, which differs between XDP and tc.
//!
//! Start at [`Hook`]. `xdp.rs` and `tc.rs` implement it.

mod tc;
mod xdp;

use aya_ebpf::bindings::bpf_fib_lookup;
use palisade_abi::{PuntHeader, Reason};
use palisade_packet::{Bytes, MAX_HEADERS};

pub use tc::Skb;
pub use xdp::Xdp;

/// Mask of an offset into the headers.
const OFFSET_MASK: u32 = 2 * MAX_HEADERS - 1;
const _: () = assert!(MAX_HEADERS.is_power_of_two());

/// Number of the [`Reason`] for a failure of [`Hook::push`] that has no more specific reason.
const FAILED: u32 = Reason::PuntFailed as u32;

/// The part of a frame that the program can read by direct packet access.
pub struct Linear {
    start: usize,
    end: usize,
    len: u32,
}

impl Bytes for Linear {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.len
    }

    #[inline(always)]
    fn array<const N: usize>(&self, offset: u32) -> Option<&[u8; N]> {
        // The verifier requires a bound on the offset before it is added to a packet pointer.
        if offset > MAX_HEADERS {
            return None;
        }
        // The mask repeats the bound on the register that is added to the pointer. LLVM compares one register with
        // MAX_HEADERS and adds a copy that was filled from the stack; the verifier of Linux 6.1 does not carry the
        // bound over to the copy, assumes an offset of up to 65535, and then ignores the comparison with the packet's
        // end. `black_box` keeps LLVM from removing the mask.
        let at = self.start + (core::hint::black_box(offset) & OFFSET_MASK) as usize;
        if at + N > self.end {
            return None;
        }
        // SAFETY: the comparison above shows that the N bytes at `at` are within the packet, and the verifier checks it
        // again. Any bytes are a valid array, and nothing writes the packet while the program reads it.
        Some(unsafe { &*(at as *const [u8; N]) })
    }

    /// Reads the word in two halves, because LLVM would otherwise read each byte. The halves are aligned: a frame
    /// starts at an even address, and every header has an even length. With its target feature
    /// `allows-misaligned-mem-access` LLVM would read whole words, but also write misaligned words to the stack, which
    /// the verifier rejects.
    #[inline(always)]
    fn word<const N: usize>(header: &[u8; N], at: usize) -> u32 {
        assert!(at + 4 <= N);
        // SAFETY: the assertion, which is decided at compile time, keeps the four bytes within the array; callers pass
        // an even `at`, so both halves are aligned.
        let [low, high] = unsafe { *header.as_ptr().add(at).cast::<[u16; 2]>() };
        let (low, high) = (low.to_ne_bytes(), high.to_ne_bytes());
        u32::from_ne_bytes([low[0], low[1], high[0], high[1]])
    }
}

/// Reads a packet pointer from the context. The read is volatile: otherwise LLVM reads the field in the caller and
/// passes it as a 32-bit number, on which the verifier rejects pointer arithmetic.
///
/// # Safety
/// `at` is a field of the context of the running program.
#[inline(always)]
unsafe fn field(at: *const u32) -> usize {
    // SAFETY: the caller passes a field of the running program's context, which is readable.
    unsafe { core::ptr::read_volatile(at) as usize }
}

/// The context of a program, and the packet that it runs on.
pub trait Hook: Copy {
    /// Returns the readable part of the frame. With `full`, its `len` is the length of the whole frame, which costs a
    /// helper call in XDP.
    fn bytes(self, full: bool) -> Linear;
    /// Returns the index of the interface that the program runs on.
    fn ifindex(self) -> u32;
    /// Returns whether this machine generated the packet; false if the packet was received.
    fn is_local(self) -> bool;
    /// Returns the index of the interface by which the packet entered the node; 0 if this machine generated the packet.
    /// The result is meaningful only at tc egress.
    fn entered_by(self) -> u32;
    /// Returns the number of VLAN tags that are in `skb->vlan_tci` and not in the frame: 0 or 1.
    fn tags_removed(self) -> u32;
    /// Makes the headers readable (tc), or compares the full length of the frame with its readable part (XDP). Returns
    /// whether decoding the frame again can give another result.
    fn pull_headers(self) -> bool;
    /// Calls the helper `bpf_fib_lookup`.
    fn route(self, question: &mut bpf_fib_lookup) -> i64;
    /// Copies the bytes of the frame at offset `at` into `into`. Returns whether that succeeded.
    fn load<const N: usize>(self, at: u32, into: &mut [u32; N]) -> bool;
    /// Overwrites `length` bytes of the frame at offset `at` with the first bytes of `from`. Returns whether that
    /// succeeded.
    fn store<const N: usize>(self, at: u32, from: &mut [u32; N], length: u32) -> bool;
    /// Truncates the frame to `length` bytes. Returns whether that worked.
    fn cut(self, length: u32) -> bool;
    /// Writes `header` in front of the packet and redirects the packet to the interface `punt_link`. Returns 0, or the
    /// number of the [`Reason`] for the failure. `header` points to the [`PuntHeader`] of this CPU. `queue`: queue of
    /// the punt link; XDP ignores it.
    fn push(self, header: *mut PuntHeader, queue: u32, punt_link: u32) -> u32;
    /// Whether a worker must carry the packets of intercepted flows to the proxy link: the XDP redirect of a veth loses
    /// `skb->ip_summed`, so a checksum that the sender has left to the device would stay incomplete.
    const BY_WORKER: bool;
    /// Whether [`Hook::set_tcp_window`] works. XDP does not know whether a checksum is complete, or whether the sender
    /// has left it to the device (`skb->ip_summed`).
    const LIMITS_WINDOWS: bool;
    /// Changes the window field of the TCP header at offset `at` from `old` to `new`, both as they are in the packet,
    /// and its checksum.
    fn set_tcp_window(self, at: u32, old: u16, new: u16);
    /// Sets the destination MAC address of the frame. Returns whether that succeeded.
    fn set_destination_mac(self, mac: [u8; 6]) -> bool;
    /// Sends the packet over the proxy link whose node's end has the index `link`: at egress through that end, with
    /// `mark` as `skb->mark`. Returns whether that succeeded; always false in XDP.
    fn send_to_proxy(self, egress: bool, link: u32, mark: u32) -> bool;
    /// Returns the number of the hook in [`palisade_abi::punt_hook`].
    fn number(self, egress: bool) -> u8;
    /// Copies the first `length` bytes of the frame to `into`. Returns whether that succeeded.
    ///
    /// # Safety
    /// `into` points to writable memory of at least `length` bytes.
    #[cfg(feature = "capture")]
    unsafe fn copy(self, into: *mut u8, length: u32) -> bool;
    /// Returns TCI and EtherType of the VLAN tag that is in `skb->vlan_tci` and not in the frame; zeros if there is
    /// none.
    #[cfg(feature = "capture")]
    fn removed_tag(self) -> (u16, u16);
}
