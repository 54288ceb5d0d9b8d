//! Programs at the hooks of an interface, those of Palisade and those of other software, for `palisade doctor` and
//! `palisade uninstall --check`. Reads only.

use palisade_abi::Direction;

use crate::{
    HookKind, SyscallError,
    hook::tcx_type,
    sys::{bpf, clsact, link::device},
};

/// Program, or another tc filter, at a hook of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Occupant {
    /// Kind of the hook.
    pub hook: HookKind,
    /// Direction of the hook.
    pub direction: Direction,
    /// Priority of a clsact filter: the lowest number runs first. 0 for XDP and tcx.
    pub priority: u16,
    /// Id of the BPF program; 0 if there is none (`flower` and other filters) or if it is unknown.
    pub program: u32,
    /// Name of the program, or the kind of a filter without a program. Empty if the name cannot be read.
    pub name: String,
}

impl Occupant {
    /// Returns whether the program has a name of Palisade's programs. The program can belong to another daemon.
    #[must_use]
    pub fn is_palisade(&self) -> bool {
        self.name.starts_with("palisade_")
    }
}

/// Returns what is attached to the hooks of an interface, in the order in which the kernel runs it: XDP, tcx, clsact.
///
/// # Errors
/// [`SyscallError`] if the hooks cannot be read: tcx needs `CAP_NET_ADMIN`.
pub fn occupants(ifindex: u32) -> Result<Vec<Occupant>, SyscallError> {
    let mut found = Vec::new();
    let name = |id| bpf::program_name(id).unwrap_or_default();
    if let Some(xdp) = device(ifindex)?.and_then(|device| device.xdp) {
        let hook = if xdp.generic {
            HookKind::XdpGeneric
        } else {
            HookKind::XdpNative
        };
        found.push(Occupant {
            hook,
            direction: Direction::Ingress,
            priority: 0,
            program: xdp.prog_id,
            name: name(xdp.prog_id),
        });
    }
    for direction in palisade_abi::DIRECTIONS {
        let programs = match bpf::tcx_programs(ifindex, tcx_type(direction)) {
            // The kernel has no tcx.
            Err(error) if error.errno() == libc::EINVAL => Vec::new(),
            other => other?,
        };
        found.extend(programs.into_iter().map(|id| Occupant {
            hook: HookKind::Tcx,
            direction,
            priority: 0,
            program: id,
            name: name(id),
        }));
        let mut filters = clsact::filters(ifindex, direction)?;
        filters.sort_by_key(|filter| filter.priority);
        found.extend(filters.into_iter().map(|filter| Occupant {
            hook: HookKind::Clsact,
            direction,
            priority: filter.priority,
            program: filter.prog_id,
            name: if filter.kind == "bpf" {
                filter.name
            } else {
                filter.kind
            },
        }));
    }
    Ok(found)
}
