//! The maps, under the names of `palisade_abi::maps`. The loader overrides sizes that depend on the node's
//! configuration.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockMap, XskMap};
use aya_ebpf::macros::btf_map;
use palisade_abi::{
    Addr, BUDGET_SLOTS, CLASS_SLOTS, COUNTER_SLOTS, Clock, Config, Counter, CtEntry, CtKey, EndpointState,
    FlowSlot, FragmentKey, FragmentPorts, FragmentSlot, ID_SLOTS, Interface, IpcacheEntry, LearnedKey,
    MAX_WORKERS, PolicyEntry, PolicyKey, PuntHeader, RateBudget, SHARE_SLOTS, Share,
};

/// Allocates map elements on insertion. Since Linux 6.1 a deleted element is available to the next insertion at once
/// (`bpf_mem_cache_free`), not only after an RCU grace period: docs/THREAT-MODEL.md, "Kernels and the punt link".
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map]
pub static INTERFACES: Array<Interface, ID_SLOTS> = Array::new();

#[btf_map]
pub static ENDPOINTS: Array<EndpointState, ID_SLOTS, MMAPABLE> = Array::new();

#[btf_map]
pub static IPCACHE: HashMap<Addr, IpcacheEntry, 262_144, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub static PREFIXES: LpmTrie<Addr, IpcacheEntry, 262_144> = LpmTrie::new();

/// Identities of learned addresses.
#[btf_map]
pub static LEARNED: HashMap<LearnedKey, u32, 262_144, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub static CLASSES: Array<[u16; CLASS_SLOTS], 1, MMAPABLE> = Array::new();

#[btf_map]
pub static POLICY: HashMap<PolicyKey, PolicyEntry, 1_048_576, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub static CONNTRACK: LruHashMap<CtKey, CtEntry, 262_144> = LruHashMap::new();

#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, 8_192> = LruHashMap::new();

/// Share of each endpoint in CONNTRACK and FRAGMENTS.
#[btf_map]
pub static SHARES: Array<Share, SHARE_SLOTS, MMAPABLE> = Array::new();

#[btf_map]
pub static FLOW_SLOTS: Array<FlowSlot, 131_072> = Array::new();

#[btf_map]
pub static FRAGMENT_SLOTS: Array<FragmentSlot, 4_096> = Array::new();

#[btf_map]
pub static EVENTS: RingBuf<(), 1_048_576> = RingBuf::new();

#[btf_map]
pub static BUDGETS: PerCpuArray<RateBudget, BUDGET_SLOTS> = PerCpuArray::new();

#[btf_map]
pub static CLOCK: PerCpuArray<Clock, 1> = PerCpuArray::new();

#[btf_map]
pub static COUNTERS: PerCpuArray<Counter, COUNTER_SLOTS> = PerCpuArray::new();

#[btf_map]
pub static RULES: PerCpuArray<Counter, 65_536> = PerCpuArray::new();

#[btf_map]
pub static CONFIG: Array<Config, 1> = Array::new();

#[btf_map]
pub static WORKERS: Array<u64, MAX_WORKERS, MMAPABLE> = Array::new();

#[btf_map]
pub static PUNT: PerCpuArray<PuntHeader, 1> = PerCpuArray::new();

#[btf_map]
pub static XSKS: XskMap<MAX_WORKERS> = XskMap::new();

/// Listening sockets of the proxy, see [`palisade_abi::listener_slot`].
#[btf_map]
pub static PROXY_LISTENERS: SockMap<4> = SockMap::new();

/// The maps of a capture.
#[cfg(feature = "capture")]
pub mod capture {
    use aya_ebpf::btf_maps::{Array, PerCpuArray, RingBuf};
    use aya_ebpf::macros::btf_map;
    use palisade_abi::{CaptureHeader, CaptureSettings, MAX_CAPTURED};

    /// A record under construction.
    #[repr(C)]
    pub struct Buffer {
        /// Verdict and lengths.
        pub header: CaptureHeader,
        /// Bytes of the packet.
        pub data: [u8; MAX_CAPTURED as usize],
    }

    #[btf_map]
    pub static CAPTURE: Array<CaptureSettings, 1> = Array::new();

    /// One buffer for each CPU. Values of a per-CPU array have at most 32 KiB (`PCPU_MIN_UNIT_SIZE`), so the index is
    /// the number of the CPU.
    #[btf_map]
    pub static CAPTURE_BUFFERS: Array<Buffer, 1> = Array::new();

    #[btf_map]
    pub static CAPTURED: RingBuf<(), 8_388_608> = RingBuf::new();

    #[btf_map]
    pub static CAPTURE_LOST: PerCpuArray<u64, 1> = PerCpuArray::new();
}
