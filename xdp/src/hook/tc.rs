//! tc programs.

use aya_ebpf::bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, TC_ACT_REDIRECT, bpf_fib_lookup};
use aya_ebpf::helpers::generated::{
    bpf_fib_lookup as fib_lookup, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_peer, bpf_skb_change_head,
    bpf_skb_change_tail, bpf_skb_change_type, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    bpf_skb_vlan_pop,
};
use palisade_abi::{MAX_PUNT_FRAME, MAX_SEGMENT_HEADERS, PuntHeader, Reason, punt_hook};
use palisade_packet::MAX_HEADERS;

use super::{FAILED, Hook, Linear, field};

/// `skb->pkt_type` of a packet to this host (linux/if_packet.h).
const PACKET_HOST: u32 = 0;

/// Context of a tc program.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Skb(pub *mut __sk_buff);

impl Hook for Skb {
    #[inline(always)]
    fn bytes(self, _: bool) -> Linear {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
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
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        unsafe { (*self.0).ifindex }
    }

    #[inline(always)]
    fn is_local(self) -> bool {
        self.entered_by() == 0
    }

    #[inline(always)]
    fn entered_by(self) -> u32 {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        unsafe { (*self.0).ingress_ifindex }
    }

    #[inline(always)]
    fn tags_removed(self) -> u32 {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        unsafe { (*self.0).vlan_present }
    }

    /// The headers can lie in page fragments of the socket buffer instead of its linear part.
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
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        unsafe { bpf_skb_pull_data(self.0, wanted) == 0 }
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
        unsafe { bpf_skb_load_bytes(self.0.cast(), at, into.as_mut_ptr().cast(), 4 * N as u32) == 0 }
    }

    #[inline(always)]
    fn store<const N: usize>(self, at: u32, from: &mut [u32; N], length: u32) -> bool {
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. Callers
        // pass a constant `length` of at most the size of the array.
        unsafe { bpf_skb_store_bytes(self.0, at, from.as_mut_ptr().cast(), length, flags) == 0 }
    }

    #[inline(always)]
    fn cut(self, length: u32) -> bool {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        unsafe { bpf_skb_change_tail(self.0, length, 0) == 0 }
    }

    /// `bpf_skb_change_head` makes room in front of the Ethernet header. If the packet is segmented later, each segment
    /// gets a copy of the punt header.
    #[inline(always)]
    fn push(self, header: *mut PuntHeader, queue: u32, punt_link: u32) -> u32 {
        const LENGTH: u32 = size_of::<PuntHeader>() as u32;
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. `header`
        // points to a map value of `LENGTH` bytes that only this CPU uses.
        unsafe {
            let skb = self.0;
            // A super-frame (GSO) is segmented when veth transmits it to the punt link, so a segment must fit.
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
                (*header).vlan = (*skb).vlan_tci as u16;
                (*header).vlan_protocol = u16::from_be((*skb).vlan_proto as u16);
                if bpf_skb_vlan_pop(skb) != 0 {
                    return FAILED;
                }
                // If the frame had two tags, `bpf_skb_vlan_pop` has moved the inner tag to `skb->vlan_tci`. The punt
                // header has room for one tag only.
                if core::ptr::read_volatile(&raw const (*skb).vlan_present) != 0 {
                    return Reason::PuntUnsupported as u32;
                }
            }
            if bpf_skb_change_head(skb, LENGTH, 0) != 0
                || bpf_skb_store_bytes(skb, 0, header.cast(), LENGTH, 0) != 0
            {
                return FAILED;
            }
            // `queue_mapping` is 1-based: `skb_tx_hash` chooses the queue `queue_mapping - 1`.
            (*skb).queue_mapping = queue + 1;
            if bpf_redirect(punt_link, 0) != i64::from(TC_ACT_REDIRECT) {
                return FAILED;
            }
            0
        }
    }

    const BY_WORKER: bool = false;

    const LIMITS_WINDOWS: bool = true;

    /// `bpf_l4_csum_replace` leaves the checksum of a CHECKSUM_PARTIAL packet, which does not cover the window yet.
    #[inline(always)]
    fn set_tcp_window(self, at: u32, old: u16, new: u16) {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The
        // helper reads the two bytes of `new`. The changes of window and checksum cancel each other in `skb->csum`.
        unsafe {
            if bpf_l4_csum_replace(self.0, at + 16, u64::from(old), u64::from(new), 2) == 0 {
                bpf_skb_store_bytes(self.0, at + 14, (&raw const new).cast(), 2, 0);
            }
        }
    }

    #[inline(always)]
    fn set_destination_mac(self, mac: [u8; 6]) -> bool {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The
        // helper reads the six bytes of `mac`. Without BPF_F_RECOMPUTE_CSUM, because `skb->csum` does not cover the
        // Ethernet header.
        unsafe { bpf_skb_store_bytes(self.0, 0, mac.as_ptr().cast(), 6, 0) == 0 }
    }

    /// At ingress the packet enters the proxy's end in the same softirq: `bpf_redirect_peer` (Linux 5.10) needs neither
    /// the egress of the node's end nor a backlog queue. The helper does not work at egress.
    #[inline(always)]
    fn send_to_proxy(self, egress: bool, link: u32, mark: u32) -> bool {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The
        // helpers take only numbers besides.
        unsafe {
            if egress {
                (*self.0).mark = mark;
                return bpf_redirect(link, 0) == i64::from(TC_ACT_REDIRECT);
            }
            // Unlike a transmission over the veth, the helper does not compare the destination MAC address with that of
            // the proxy's end, and the IP layer drops packets to other hosts, as a bridge port receives them.
            bpf_skb_change_type(self.0, PACKET_HOST) == 0
                && bpf_redirect_peer(link, 0) == i64::from(TC_ACT_REDIRECT)
        }
    }

    #[inline(always)]
    fn number(self, egress: bool) -> u8 {
        if egress {
            punt_hook::TC_EGRESS
        } else {
            punt_hook::TC_INGRESS
        }
    }

    #[cfg(feature = "capture")]
    #[inline(always)]
    unsafe fn copy(self, into: *mut u8, length: u32) -> bool {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The
        // caller passes memory of `length` bytes; the helper fills it or fails.
        unsafe { bpf_skb_load_bytes(self.0.cast(), 0, into.cast(), length) == 0 }
    }

    #[cfg(feature = "capture")]
    #[inline(always)]
    fn removed_tag(self) -> (u16, u16) {
        // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
        unsafe {
            let skb = self.0;
            if (*skb).vlan_present == 0 {
                return (0, 0);
            }
            ((*skb).vlan_tci as u16, u16::from_be((*skb).vlan_proto as u16))
        }
    }
}
