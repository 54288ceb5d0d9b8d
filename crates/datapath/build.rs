//! Compiles `xdp/` for the BPF target: `OUT_DIR/palisade`; `OUT_DIR/palisade-capture`, whose programs copy packets for
//! a capture; and with the feature `bench-object` also `OUT_DIR/palisade-bench`, which has the benchmark's programs.
//!
//! `PALISADE_BPF_TOOLCHAIN` names the toolchain for that target; the default is the one that `scripts/setup` builds
//! from Debian's packages.
#![allow(unsafe_code, reason = "environment variables of the build")]

use anyhow::Context as _;

/// Toolchain of `scripts/setup`: a stable compiler with a prebuilt `core` for the BPF target.
const DEBIAN_TOOLCHAIN: &str = "palisade-bpf";

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-env-changed=PALISADE_BPF_TOOLCHAIN");
    let toolchain = std::env::var("PALISADE_BPF_TOOLCHAIN").unwrap_or_else(|_| DEBIAN_TOOLCHAIN.into());
    // SAFETY: this build script has one thread.
    unsafe {
        if toolchain == DEBIAN_TOOLCHAIN {
            // aya-ebpf needs an unstable feature (BPF inline assembly), which this enables for that crate only. With
            // "1", aya-build would use build-std, for which this toolchain has no sources.
            std::env::set_var("RUSTC_BOOTSTRAP", "aya_ebpf");
        }
        // Otherwise cargo repeats every "Compiling ..." line of the inner build as a warning of each build.
        std::env::set_var("CARGO_TERM_QUIET", "true");
    }

    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../xdp");
    for shared in ["abi", "packet"] {
        println!(
            "cargo:rerun-if-changed={}/../{shared}/src",
            env!("CARGO_MANIFEST_DIR")
        );
    }
    // aya-build searches the package in the current directory.
    std::env::set_current_dir(root).with_context(|| format!("the BPF programs are not at {root}"))?;
    if std::env::var_os("CARGO_FEATURE_BENCH_OBJECT").is_some() {
        build_as("palisade-bench", root, &toolchain, &["bench"])?;
    }
    build_as("palisade-capture", root, &toolchain, &["capture"])?;
    build(root, &toolchain, &[])
}

/// Writes an object with features to `OUT_DIR`, under a name of its own.
fn build_as(name: &str, root: &str, toolchain: &str, features: &[&str]) -> anyhow::Result<()> {
    build(root, toolchain, features)?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    std::fs::rename(out.join("palisade"), out.join(name)).with_context(|| format!("the object {name}"))
}

/// Writes the object to `OUT_DIR/palisade`.
fn build(root: &str, toolchain: &str, features: &[&str]) -> anyhow::Result<()> {
    aya_build::build_ebpf(
        [aya_build::Package { name: "palisade-xdp", root_dir: root, features, ..Default::default() }],
        aya_build::Toolchain::Custom(toolchain),
    )
    .with_context(|| {
        format!("building the BPF programs with the rustup toolchain `{toolchain}`: run scripts/setup, or name another in PALISADE_BPF_TOOLCHAIN")
    })
}
