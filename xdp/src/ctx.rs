//! Access to a packet: what differs between XDP and tc.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_RECOMPUTE_CSUM, TC_ACT_REDIRECT, bpf_fib_lookup, xdp_action, xdp_md,
};
use aya_ebpf::helpers::generated::{
    bpf_fib_lookup as fib_lookup, bpf_redirect, bpf_skb_change_head, bpf_skb_change_tail, bpf_skb_load_bytes,
    bpf_skb_pull_data, bpf_skb_store_bytes, bpf_skb_vlan_pop, bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
    bpf_xdp_get_buff_len, bpf_xdp_load_bytes, bpf_xdp_store_bytes,
};
use palisade_abi::{CtEntry, MAX_PUNT_FRAME, MAX_SEGMENT_HEADERS, PuntHeader, Reason, punt_hook};
use palisade_packet::{Bytes, MAX_HEADERS};

use crate::packet_context::PacketContext;
use crate::{enforce, event};

/// The bits of an offset into the headers.
const OFFSET_MASK: u32 = 2 * MAX_HEADERS - 1;
const _: () = assert!(MAX_HEADERS.is_power_of_two());

/// Why a packet was not put on the punt link, if nothing else is known.
const FAILED: u32 = Reason::PuntFailed as u32;

/// The readable part of a frame, by direct packet access.
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
        // The verifier wants the offset bounded before it is added to a packet pointer.
        if offset > MAX_HEADERS {
            return None;
        }
        // Bounded a second time, on the very register that is added to the pointer. LLVM compares one register with
        // MAX_HEADERS and adds a copy of it that was filled from the stack; the verifier of Linux 6.1 does not carry
        // the bound from the one to the other, takes the offset for up to 65535, and then does not believe the
        // comparison with the packet's end. `black_box` keeps LLVM from removing the mask as without effect.
        let at = self.start + (core::hint::black_box(offset) & OFFSET_MASK) as usize;
        if at + N > self.end {
            return None;
        }
        // SAFETY: the N bytes at `at` are within the packet, as just compared; the verifier checks it again. They
        // are plain bytes, and nobody writes them while the program runs.
        Some(unsafe { &*(at as *const [u8; N]) })
    }

    /// In two halves: a frame starts at an even address, and every header is an even number of bytes long. (The
    /// compiler would read byte by byte. Its feature `allows-misaligned-mem-access` is no way out: it then also
    /// writes misaligned words to the stack, which the verifier refuses.)
    #[inline(always)]
    fn word<const N: usize>(header: &[u8; N], at: usize) -> u32 {
        assert!(at + 4 <= N);
        // SAFETY: within the array, as just compared (at compile time: both are constants), and even.
        let [low, high] = unsafe { *header.as_ptr().add(at).cast::<[u16; 2]>() };
        let (low, high) = (low.to_ne_bytes(), high.to_ne_bytes());
        u32::from_ne_bytes([low[0], low[1], high[0], high[1]])
    }
}

/// Reads a packet pointer from the context. Volatile, or the compiler reads it in the caller and hands it to the
/// function that wants it as a 32-bit number, which the verifier then takes for arithmetic on a pointer.
///
/// # Safety
/// `at` is a field of the context of the running program.
#[inline(always)]
unsafe fn field(at: *const u32) -> usize {
    // SAFETY: as the caller promises.
    unsafe { core::ptr::read_volatile(at) as usize }
}

/// A program's context.
pub trait Context: Copy + crate::link::Judge {
    /// The frame. `whole` asks for its true length even where that costs a call.
    fn bytes(self, whole: bool) -> Linear;
    /// The interface the program runs on.
    fn ifindex(self) -> u32;
    /// Whether the packet was made on this machine rather than received.
    fn is_local(self) -> bool;
    /// The interface by which the packet entered the node; 0 if it was made here. IpcacheHit at egress only.
    fn entered_by(self) -> u32;
    /// VLAN tags that the kernel keeps beside the frame.
    fn tags_removed(self) -> u32;
    /// Makes more of the frame readable, or its true length known. Whether that changed anything.
    fn pull_headers(self) -> bool;
    /// `bpf_fib_lookup`.
    fn route(self, question: &mut bpf_fib_lookup) -> i64;
    /// [`crate::decode`].
    fn decode(self, frame: &mut PacketContext);
    /// [`crate::enforce::enforce_endpoint`].
    fn enforce_endpoint(self, frame: &mut PacketContext);
    /// [`crate::enforce::admit_new_flow`].
    fn admit_new_flow(self, frame: &mut PacketContext);
    /// [`crate::enforce::reevaluate_flow`].
    fn reevaluate_flow(self, frame: &mut PacketContext, entry: &mut CtEntry);
    /// [`crate::enforce::match_icmp_error`].
    fn match_icmp_error(self, frame: &mut PacketContext);
    /// [`crate::punt::punt`].
    fn punt(self, frame: &mut PacketContext);
    /// Copies bytes of the frame; whether it has them.
    fn load<const N: usize>(self, at: u32, into: &mut [u32; N]) -> bool;
    /// Overwrites `length` bytes of the frame by the first ones of `from`; whether it has them.
    fn store<const N: usize>(self, at: u32, from: &mut [u32; N], length: u32) -> bool;
    /// Cuts the frame to this length; whether that worked.
    fn cut(self, length: u32) -> bool;
    /// What differs of [`crate::punt::punt`]: puts what stands before a packet there, and has it redirected. 0, or
    /// the number of the [`Reason`] why that did not work.
    fn push(self, carried: &mut PuntHeader, queue: u32, punt_link: u32) -> u32;
    /// [`palisade_abi::punt_hook`].
    fn hook(self, egress: bool) -> u8;
    /// [`crate::event::send`].
    fn send(self, frame: &PacketContext, what: u32, flow: *const CtEntry);
}

/// Functions with C linkage: global functions of the program, which the verifier takes once and by their types,
/// whatever calls them. A global function gets memory whose content is unknown and which may be missing, and returns
/// a number.
macro_rules! global_functions {
    ($context:ident, $raw:ty, $decode:ident, $enforce_endpoint:ident, $admit_new_flow:ident, $reevaluate_flow:ident,
     $match_icmp_error:ident, $punt:ident, $send:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $punt(ctx: *mut $raw, frame: *mut PacketContext) -> u32 {
            // SAFETY: see the next function.
            let Some(frame) = (unsafe { frame.as_mut() }) else {
                return 0;
            };
            crate::punt::punt($context(ctx), frame);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $decode(ctx: *mut $raw, frame: *mut PacketContext) -> u32 {
            // SAFETY: the callers below pass references; the verifier wants the comparison with null.
            let Some(frame) = (unsafe { frame.as_mut() }) else {
                return 0;
            };
            crate::decode_frame($context(ctx), frame);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $enforce_endpoint(ctx: *mut $raw, frame: *mut PacketContext) -> u32 {
            // SAFETY: see the first function.
            let Some(frame) = (unsafe { frame.as_mut() }) else {
                return 0;
            };
            enforce::enforce_endpoint::<$context, false>($context(ctx), frame);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $admit_new_flow(ctx: *mut $raw, frame: *mut PacketContext) -> u32 {
            // SAFETY: see the first function.
            let Some(frame) = (unsafe { frame.as_mut() }) else {
                return 0;
            };
            enforce::admit_new_flow($context(ctx), frame);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $reevaluate_flow(
            ctx: *mut $raw,
            frame: *mut PacketContext,
            entry: *mut CtEntry,
        ) -> u32 {
            // SAFETY: see the first function.
            let (Some(frame), Some(entry)) = (unsafe { (frame.as_mut(), entry.as_mut()) }) else {
                return 0;
            };
            enforce::reevaluate_flow($context(ctx), frame, entry);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $match_icmp_error(ctx: *mut $raw, frame: *mut PacketContext) -> u32 {
            // SAFETY: see the first function.
            let Some(frame) = (unsafe { frame.as_mut() }) else {
                return 0;
            };
            enforce::match_icmp_error($context(ctx), frame);
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $send(
            ctx: *mut $raw,
            frame: *const PacketContext,
            what: u32,
            flow: *const CtEntry,
        ) -> u32 {
            // SAFETY: see the first function.
            let Some(frame) = (unsafe { frame.as_ref() }) else {
                return 0;
            };
            // SAFETY: a live entry, or null.
            event::send($context(ctx), frame, what, unsafe { flow.as_ref() });
            0
        }
    };
}

global_functions!(
    Xdp,
    xdp_md,
    xdp_decode,
    xdp_enforce_endpoint,
    xdp_admit_new_flow,
    xdp_reevaluate_flow,
    xdp_match_icmp_error,
    xdp_punt,
    xdp_send
);
global_functions!(
    Skb,
    __sk_buff,
    tc_decode,
    tc_enforce_endpoint,
    tc_admit_new_flow,
    tc_reevaluate_flow,
    tc_match_icmp_error,
    tc_punt,
    tc_send
);

/// The methods of [`Context`] that call the global functions.
macro_rules! calls {
    ($decode:ident, $enforce_endpoint:ident, $admit_new_flow:ident, $reevaluate_flow:ident, $match_icmp_error:ident, $punt:ident,
     $send:ident) => {
        #[inline(always)]
        fn punt(self, frame: &mut PacketContext) {
            $punt(self.0, frame);
        }
        #[inline(always)]
        fn decode(self, frame: &mut PacketContext) {
            $decode(self.0, frame);
        }
        #[inline(always)]
        fn enforce_endpoint(self, frame: &mut PacketContext) {
            $enforce_endpoint(self.0, frame);
        }
        #[inline(always)]
        fn admit_new_flow(self, frame: &mut PacketContext) {
            $admit_new_flow(self.0, frame);
        }
        #[inline(always)]
        fn reevaluate_flow(self, frame: &mut PacketContext, entry: &mut CtEntry) {
            $reevaluate_flow(self.0, frame, entry);
        }
        #[inline(always)]
        fn match_icmp_error(self, frame: &mut PacketContext) {
            $match_icmp_error(self.0, frame);
        }
        #[inline(always)]
        fn send(self, frame: &PacketContext, what: u32, flow: *const CtEntry) {
            if event::may_send(frame, what) {
                $send(self.0, frame, what, flow);
            }
        }
    };
}

/// Context of an XDP program.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Xdp(pub *mut xdp_md);

// SAFETY (every block below): the context pointer is the one the kernel gave the program, valid while it runs.
impl Context for Xdp {
    calls!(
        xdp_decode,
        xdp_enforce_endpoint,
        xdp_admit_new_flow,
        xdp_reevaluate_flow,
        xdp_match_icmp_error,
        xdp_punt,
        xdp_send
    );

    #[inline(always)]
    fn bytes(self, whole: bool) -> Linear {
        // SAFETY: see above the impl.
        let (start, end) = unsafe {
            (
                field(&raw const (*self.0).data),
                field(&raw const (*self.0).data_end),
            )
        };
        let len = if whole {
            // SAFETY: see above the impl.
            unsafe { bpf_xdp_get_buff_len(self.0) as u32 }
        } else {
            (end - start) as u32
        };
        Linear { start, end, len }
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: see above the impl.
        unsafe { (*self.0).ingress_ifindex }
    }

    #[inline(always)]
    fn is_local(self) -> bool {
        false
    }

    #[inline(always)]
    fn entered_by(self) -> u32 {
        0
    }

    #[inline(always)]
    fn tags_removed(self) -> u32 {
        0
    }

    /// A frame of several buffers (jumbo frames) is longer than its readable part.
    #[inline(always)]
    fn pull_headers(self) -> bool {
        let linear = self.bytes(false).len;
        self.bytes(true).len > linear
    }

    #[inline(always)]
    fn route(self, question: &mut bpf_fib_lookup) -> i64 {
        let size = size_of::<bpf_fib_lookup>() as i32;
        // SAFETY: see above the impl; the size is that of the parameter block.
        unsafe { fib_lookup(self.0.cast(), question, size, 0) }
    }

    #[inline(always)]
    fn load<const N: usize>(self, at: u32, into: &mut [u32; N]) -> bool {
        // SAFETY: see above the impl; the helper fills that memory or fails.
        unsafe { bpf_xdp_load_bytes(self.0, at, into.as_mut_ptr().cast(), 4 * N as u32) == 0 }
    }

    #[inline(always)]
    fn store<const N: usize>(self, at: u32, from: &mut [u32; N], length: u32) -> bool {
        // SAFETY: see above the impl; `length` is a constant of at most the array's size.
        unsafe { bpf_xdp_store_bytes(self.0, at, from.as_mut_ptr().cast(), length) == 0 }
    }

    #[inline(always)]
    fn cut(self, length: u32) -> bool {
        let surplus = self.bytes(true).len.wrapping_sub(length) as i32;
        // SAFETY: see above the impl.
        unsafe { bpf_xdp_adjust_tail(self.0, -surplus) == 0 }
    }

    /// The frame is copied where it lies: XDP leaves room for headers in front.
    #[inline(always)]
    fn push(self, carried: &mut PuntHeader, _: u32, punt_link: u32) -> u32 {
        const LENGTH: usize = size_of::<PuntHeader>();
        if self.bytes(true).len > MAX_PUNT_FRAME {
            return Reason::PuntUnsupported as u32;
        }
        // SAFETY: see above the impl.
        if unsafe { bpf_xdp_adjust_head(self.0, -(LENGTH as i32)) } != 0 {
            return FAILED;
        }
        let bytes = self.bytes(false);
        if bytes.start + LENGTH > bytes.end {
            return FAILED;
        }
        // SAFETY: within the packet, as just compared, at an even address; written in halves of words for that.
        unsafe {
            let to = bytes.start as *mut u16;
            let from = core::ptr::from_mut(carried).cast::<u16>();
            for i in 0..LENGTH / 2 {
                *to.add(i) = *from.add(i);
            }
        }
        // SAFETY: takes and changes nothing but what becomes of this packet.
        if unsafe { bpf_redirect(punt_link, 0) } != i64::from(xdp_action::XDP_REDIRECT) {
            return FAILED;
        }
        0
    }

    #[inline(always)]
    fn hook(self, _: bool) -> u8 {
        punt_hook::XDP_INGRESS
    }
}

/// Context of a tc program.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Skb(pub *mut __sk_buff);

// SAFETY (every block below): the context pointer is the one the kernel gave the program, valid while it runs.
impl Context for Skb {
    calls!(
        tc_decode,
        tc_enforce_endpoint,
        tc_admit_new_flow,
        tc_reevaluate_flow,
        tc_match_icmp_error,
        tc_punt,
        tc_send
    );

    #[inline(always)]
    fn bytes(self, _: bool) -> Linear {
        // SAFETY: see above the impl.
        unsafe {
            let skb = self.0;
            Linear {
                start: field(&raw const (*skb).data),
                end: field(&raw const (*skb).data_end),
                len: (*skb).len,
            }
        }
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: see above the impl.
        unsafe { (*self.0).ifindex }
    }

    #[inline(always)]
    fn is_local(self) -> bool {
        self.entered_by() == 0
    }

    #[inline(always)]
    fn entered_by(self) -> u32 {
        // SAFETY: see above the impl.
        unsafe { (*self.0).ingress_ifindex }
    }

    #[inline(always)]
    fn tags_removed(self) -> u32 {
        // SAFETY: see above the impl.
        unsafe { (*self.0).vlan_present }
    }

    /// Headers may lie in the pages of a socket buffer instead of its linear part.
    #[inline(always)]
    fn pull_headers(self) -> bool {
        let bytes = self.bytes(false);
        let wanted = if bytes.len > MAX_HEADERS {
            MAX_HEADERS
        } else {
            bytes.len
        };
        if bytes.end - bytes.start >= wanted as usize {
            return false;
        }
        // SAFETY: see above the impl.
        unsafe { bpf_skb_pull_data(self.0, wanted) == 0 }
    }

    #[inline(always)]
    fn route(self, question: &mut bpf_fib_lookup) -> i64 {
        let size = size_of::<bpf_fib_lookup>() as i32;
        // SAFETY: see above the impl; the size is that of the parameter block.
        unsafe { fib_lookup(self.0.cast(), question, size, 0) }
    }

    #[inline(always)]
    fn load<const N: usize>(self, at: u32, into: &mut [u32; N]) -> bool {
        // SAFETY: see above the impl; the helper fills that memory or fails.
        unsafe { bpf_skb_load_bytes(self.0.cast(), at, into.as_mut_ptr().cast(), 4 * N as u32) == 0 }
    }

    #[inline(always)]
    fn store<const N: usize>(self, at: u32, from: &mut [u32; N], length: u32) -> bool {
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
        // SAFETY: see above the impl; `length` is a constant of at most the array's size.
        unsafe { bpf_skb_store_bytes(self.0, at, from.as_mut_ptr().cast(), length, flags) == 0 }
    }

    #[inline(always)]
    fn cut(self, length: u32) -> bool {
        // SAFETY: see above the impl.
        unsafe { bpf_skb_change_tail(self.0, length, 0) == 0 }
    }

    /// The head grows in front of the Ethernet header; what is segmented later takes it along.
    #[inline(always)]
    fn push(self, carried: &mut PuntHeader, queue: u32, punt_link: u32) -> u32 {
        const LENGTH: u32 = size_of::<PuntHeader>() as u32;
        // SAFETY: see above the impl; `carried` is memory of `LENGTH` bytes.
        unsafe {
            let skb = self.0;
            // A super-frame is cut to its segment size when it enters the punt link.
            let gso = (*skb).gso_size;
            let longest = if gso == 0 {
                (*skb).len
            } else {
                gso + MAX_SEGMENT_HEADERS
            };
            if longest > MAX_PUNT_FRAME {
                return Reason::PuntUnsupported as u32;
            }
            if (*skb).vlan_present != 0 {
                carried.vlan = (*skb).vlan_tci as u16;
                carried.vlan_protocol = u16::from_be((*skb).vlan_proto as u16);
                if bpf_skb_vlan_pop(skb) != 0 {
                    return FAILED;
                }
                // Of two tags the inner one has taken the place beside the frame; there is room for one only.
                if core::ptr::read_volatile(&raw const (*skb).vlan_present) != 0 {
                    return Reason::PuntUnsupported as u32;
                }
            }
            if bpf_skb_change_head(skb, LENGTH, 0) != 0
                || bpf_skb_store_bytes(skb, 0, core::ptr::from_mut(carried).cast(), LENGTH, 0) != 0
            {
                return FAILED;
            }
            // Of the queues of the punt link the kernel takes the one before this.
            (*skb).queue_mapping = queue + 1;
            if bpf_redirect(punt_link, 0) != i64::from(TC_ACT_REDIRECT) {
                return FAILED;
            }
            0
        }
    }

    #[inline(always)]
    fn hook(self, egress: bool) -> u8 {
        if egress {
            punt_hook::TC_EGRESS
        } else {
            punt_hook::TC_INGRESS
        }
    }
}
