//! Asks the kernel which hooks of an interface have BPF programs. bpftool is not used, because older versions do not
//! know tcx.

use std::io;

use anyhow::{Context, Result};

use crate::ns::Ns;

/// `BPF_PROG_QUERY` (linux/bpf.h).
const BPF_PROG_QUERY: libc::c_long = 16;
/// `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS`.
const TCX: [(&str, u32); 2] = [("tcx ingress", 46), ("tcx egress", 47)];

/// The part of `union bpf_attr` for `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct ProgQuery {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    zero: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Returns the hooks of an interface that have a program: `xdp`, `tcx ingress`, `tcx egress`, `clsact ingress`,
/// `clsact egress`.
pub fn hooks(ns: &Ns, interface: &str) -> Result<Vec<&'static str>> {
    let mut found = Vec::new();
    if ns
        .run("ip", &["-d", "link", "show", "dev", interface])?
        .contains("prog/xdp")
    {
        found.push("xdp");
    }
    let ifindex = ns.ifindex(interface)?;
    for (name, attach_type) in TCX {
        if ns
            .enter(|| tcx_programs(ifindex, attach_type))
            .with_context(|| format!("{name} of {interface}"))?
            > 0
        {
            found.push(name);
        }
    }
    for (name, side) in [("clsact ingress", "ingress"), ("clsact egress", "egress")] {
        // Without a clsact qdisc, `tc filter show` prints nothing.
        if ns
            .run("tc", &["filter", "show", "dev", interface, side])?
            .contains("bpf")
        {
            found.push(name);
        }
    }
    Ok(found)
}

fn tcx_programs(ifindex: u32, attach_type: u32) -> io::Result<u32> {
    let mut query = ProgQuery {
        target_ifindex: ifindex,
        attach_type,
        ..ProgQuery::default()
    };
    // SAFETY: the kernel reads and writes at most `size_of::<ProgQuery>()` bytes of `query`, which outlives the call.
    // `prog_ids` and `link_ids` are null, so the kernel writes no arrays and returns only the count.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            &raw mut query,
            size_of::<ProgQuery>() as libc::c_long,
        )
    };
    if result == 0 {
        return Ok(query.count);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // ENOENT: no program is attached (some kernels return success and a count of 0 instead). EINVAL: the kernel has
        // no tcx.
        Some(libc::ENOENT | libc::EINVAL) => Ok(0),
        _ => Err(error),
    }
}
