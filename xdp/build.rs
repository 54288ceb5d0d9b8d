//! Options of the BPF linker.

fn main() {
    // With its default order-keeping expansion LLVM makes every small memset and memcpy a call of a byte loop.
    println!("cargo:rustc-link-arg=--disable-expand-memcpy-in-order");
    println!("cargo:rerun-if-changed=build.rs");
}
