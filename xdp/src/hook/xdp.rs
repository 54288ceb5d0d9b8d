//! XDP programs.

use aya_ebpf::bindings::{bpf_fib_lookup, xdp_action, xdp_md};
use aya_ebpf::helpers::generated::{
    bpf_fib_lookup as fib_lookup, bpf_redirect, bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
    bpf_xdp_get_buff_len, bpf_xdp_load_bytes, bpf_xdp_store_bytes,
};
use palisade_abi::{MAX_PUNT_FRAME, PuntHeader, Reason, punt_hook};

use super::{FAILED, Hook, Linear, field};

/// Context of an XDP program.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Xdp(pub *mut xdp_md);

impl Hook for Xdp {
    #[inline(always)]
    fn bytes(self, full: bool) -> Linear {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        let (start, end) = unsafe {
            (
                field(&raw const (*self.0).data),
                field(&raw const (*self.0).data_end),
            )
        };
        let len = if full {
            // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
            unsafe { bpf_xdp_get_buff_len(self.0) as u32 }
        } else {
            (end - start) as u32
        };
        Linear { start, end, len }
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
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

    /// A frame in several buffers (a jumbo frame) is longer than its readable part.
    #[inline(always)]
    fn pull_headers(self) -> bool {
        let linear = self.bytes(false).len;
        self.bytes(true).len > linear
    }

    #[inline(always)]
    fn route(self, question: &mut bpf_fib_lookup) -> i64 {
        let size = size_of::<bpf_fib_lookup>() as i32;
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. `size` is
        // the size of `question`.
        unsafe { fib_lookup(self.0.cast(), question, size, 0) }
    }

    #[inline(always)]
    fn load<const N: usize>(self, at: u32, into: &mut [u32; N]) -> bool {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The
        // helper fills the array or fails.
        unsafe { bpf_xdp_load_bytes(self.0, at, into.as_mut_ptr().cast(), 4 * N as u32) == 0 }
    }

    #[inline(always)]
    fn store<const N: usize>(self, at: u32, from: &mut [u32; N], length: u32) -> bool {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. Callers
        // pass a constant `length` of at most the size of the array.
        unsafe { bpf_xdp_store_bytes(self.0, at, from.as_mut_ptr().cast(), length) == 0 }
    }

    #[inline(always)]
    fn cut(self, length: u32) -> bool {
        let surplus = self.bytes(true).len.wrapping_sub(length) as i32;
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        unsafe { bpf_xdp_adjust_tail(self.0, -surplus) == 0 }
    }

    /// XDP has headroom in front of the frame, so only the header is copied.
    #[inline(always)]
    fn push(self, header: *mut PuntHeader, _: u32, punt_link: u32) -> u32 {
        const LENGTH: usize = size_of::<PuntHeader>();
        if self.bytes(true).len > MAX_PUNT_FRAME {
            return Reason::PuntUnsupported as u32;
        }
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        if unsafe { bpf_xdp_adjust_head(self.0, -(LENGTH as i32)) } != 0 {
            return FAILED;
        }
        let bytes = self.bytes(false);
        if bytes.start + LENGTH > bytes.end {
            return FAILED;
        }
        // SAFETY: the comparison above shows that the packet has `LENGTH` bytes. A frame starts at an even address, so
        // the `u16` accesses are aligned; `header` points to a map value of `LENGTH` bytes that only this CPU uses.
        unsafe {
            let to = bytes.start as *mut u16;
            let from = header.cast::<u16>();
            for i in 0..LENGTH / 2 {
                *to.add(i) = *from.add(i);
            }
        }
        // SAFETY: the helper takes only numbers, and it redirects only the packet that the program runs on.
        if unsafe { bpf_redirect(punt_link, 0) } != i64::from(xdp_action::XDP_REDIRECT) {
            return FAILED;
        }
        0
    }

    const BY_WORKER: bool = true;

    const LIMITS_WINDOWS: bool = false;

    #[inline(always)]
    fn set_tcp_window(self, _: u32, _: u16, _: u16) {}

    #[inline(always)]
    fn set_destination_mac(self, mac: [u8; 6]) -> bool {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The
        // helper reads the six bytes of `mac`, or fails.
        unsafe { bpf_xdp_store_bytes(self.0, 0, mac.as_ptr().cast_mut().cast(), 6) == 0 }
    }

    #[inline(always)]
    fn send_to_proxy(self, _: bool, _: u32, _: u32) -> bool {
        false
    }

    #[inline(always)]
    fn number(self, _: bool) -> u8 {
        punt_hook::XDP_INGRESS
    }

    #[cfg(feature = "capture")]
    #[inline(always)]
    unsafe fn copy(self, into: *mut u8, length: u32) -> bool {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The
        // caller passes memory of `length` bytes; the helper fills it or fails.
        unsafe { bpf_xdp_load_bytes(self.0, 0, into.cast(), length) == 0 }
    }

    #[cfg(feature = "capture")]
    #[inline(always)]
    fn removed_tag(self) -> (u16, u16) {
        (0, 0)
    }
}
