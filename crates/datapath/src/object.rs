//! BPF object, compiled by `build.rs` from `xdp/`.

/// BPF object with all programs and maps, aligned as its ELF reader requires.
pub const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/palisade"));

/// [`OBJECT`] with programs that copy packets for a capture.
pub const CAPTURE_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/palisade-capture"));

/// [`OBJECT`] and the programs of the benchmark (`xdp/src/bench.rs`).
#[cfg(feature = "bench-object")]
pub const BENCH_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/palisade-bench"));
