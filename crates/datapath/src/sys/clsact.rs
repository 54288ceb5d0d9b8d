//! The clsact qdisc and its BPF filters, by rtnetlink: the tc hooks of kernels without tcx.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use palisade_abi::Direction;

use super::{
    SyscallError, kernel_release,
    netlink::{Request, Socket, find, text, u32_at},
};

type Result<T> = std::result::Result<T, SyscallError>;

/// Lowest priority number: filters with other priorities run after this one.
pub(crate) const PRIORITY: u16 = 1;
/// Handle of the filter of Palisade at its priority ("PAL").
pub(crate) const HANDLE: u32 = 0x50_41_4c;

const CLSACT_PARENT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const INGRESS_PARENT: u32 = 0xffff_fff2;
const EGRESS_PARENT: u32 = 0xffff_fff3;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// Filter at the ingress or egress hook.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Filter {
    pub priority: u16,
    pub handle: u32,
    pub kind: String,
    /// Name and id of the program of a BPF filter; empty and 0 for other kinds.
    pub name: String,
    pub prog_id: u32,
}

impl Filter {
    /// Returns whether the filter has the priority and handle of the filter of Palisade.
    pub(crate) fn is_own_slot(&self) -> bool {
        self.priority == PRIORITY && self.handle == HANDLE
    }
}

fn parent(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => INGRESS_PARENT,
        Direction::Egress => EGRESS_PARENT,
    }
}

/// Returns a `struct tcmsg`.
fn tcmsg(ifindex: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    for (at, word) in [(4, ifindex), (8, handle), (12, parent), (16, info)] {
        bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// Returns priority and protocol (ETH_P_ALL) of the filter of Palisade, as in `tcm_info`.
fn filter_info() -> u32 {
    u32::from(PRIORITY) << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
}

fn c_string(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// Returns the kind of the qdisc that holds the ingress filters of an interface: `clsact`, or `ingress`, which has no
/// egress hook; `None` if there is no such qdisc.
pub(crate) fn qdisc(ifindex: u32) -> Result<Option<String>> {
    let mut kind = None;
    Socket::open(libc::NETLINK_ROUTE)?.query(
        Request::new(libc::RTM_GETQDISC, 0).fixed(&tcmsg(ifindex, 0, 0, 0)),
        libc::NLM_F_DUMP,
        "RTM_GETQDISC",
        &mut |_, payload| {
            // The kernel can dump the qdiscs of every interface.
            if u32_at(payload, 4) == Some(ifindex) && u32_at(payload, 12) == Some(CLSACT_PARENT) {
                kind = payload
                    .get(20..)
                    .and_then(|attributes| find(attributes, TCA_KIND))
                    .map(text);
            }
        },
    )?;
    Ok(kind)
}

pub(crate) fn add_qdisc(ifindex: u32) -> Result<()> {
    let request = Request::new(libc::RTM_NEWQDISC, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
        .fixed(&tcmsg(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0))
        .attr(TCA_KIND, b"clsact\0");
    Socket::open(libc::NETLINK_ROUTE)?
        .execute(request, "RTM_NEWQDISC of clsact")
        .map_err(|error| missing(error, "clsact qdisc", "sch_ingress", "CONFIG_NET_SCH_INGRESS"))
}

/// Adds the name of the missing feature to an ENOENT error, which the kernel returns for an unknown kind of qdisc or
/// filter after it has tried to load the module.
fn missing(error: SyscallError, feature: &str, module: &str, option: &str) -> SyscallError {
    if error.errno() != libc::ENOENT {
        return error;
    }
    let release = kernel_release();
    SyscallError {
        call: format!(
            "Linux {release} has no {feature} (module {module}, {option}): {}",
            error.call
        ),
        ..error
    }
}

pub(crate) fn delete_qdisc(ifindex: u32) -> Result<()> {
    let request = Request::new(libc::RTM_DELQDISC, 0).fixed(&tcmsg(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0));
    Socket::open(libc::NETLINK_ROUTE)?.execute(request, "RTM_DELQDISC of clsact")
}

/// Adds the filter of Palisade, or replaces its program. cls_bpf replaces the program under RCU, so every packet meets
/// the old program or the new one.
pub(crate) fn set_filter(ifindex: u32, direction: Direction, prog: BorrowedFd<'_>, name: &str) -> Result<()> {
    let request = Request::new(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)
        .fixed(&tcmsg(ifindex, HANDLE, parent(direction), filter_info()))
        .attr(TCA_KIND, b"bpf\0")
        .nested(TCA_OPTIONS, |options| {
            options
                .attr(TCA_BPF_FD, &prog.as_raw_fd().to_ne_bytes())
                .attr(TCA_BPF_NAME, &c_string(name))
                .attr(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes())
        });
    Socket::open(libc::NETLINK_ROUTE)?
        .execute(request, "RTM_NEWTFILTER of a clsact filter")
        .map_err(|error| missing(error, "BPF filter", "cls_bpf", "CONFIG_NET_CLS_BPF"))
}

pub(crate) fn delete_filter(ifindex: u32, direction: Direction) -> Result<()> {
    let request = Request::new(libc::RTM_DELTFILTER, 0)
        .fixed(&tcmsg(ifindex, HANDLE, parent(direction), filter_info()))
        .attr(TCA_KIND, b"bpf\0");
    Socket::open(libc::NETLINK_ROUTE)?.execute(request, "RTM_DELTFILTER of a clsact filter")
}

/// Returns the filters at a hook.
pub(crate) fn filters(ifindex: u32, direction: Direction) -> Result<Vec<Filter>> {
    let mut filters = Vec::new();
    let answer = Socket::open(libc::NETLINK_ROUTE)?.query(
        Request::new(libc::RTM_GETTFILTER, 0).fixed(&tcmsg(ifindex, 0, parent(direction), 0)),
        libc::NLM_F_DUMP,
        "RTM_GETTFILTER",
        &mut |kind, payload| {
            if kind == libc::RTM_NEWTFILTER {
                filters.extend(parse(payload));
            }
        },
    );
    match answer {
        // Without a qdisc there are no filters.
        Err(e) if matches!(e.errno(), libc::EINVAL | libc::ENOENT) => Ok(Vec::new()),
        other => other.map(|()| filters),
    }
}

/// Parses a filter. Returns `None` for a message with handle 0, which describes the priority and not a filter.
fn parse(payload: &[u8]) -> Option<Filter> {
    let handle = u32_at(payload, 8)?;
    let info = u32_at(payload, 16)?;
    let attributes = payload.get(20..)?;
    let options = find(attributes, TCA_OPTIONS).unwrap_or(&[]);
    let kind = find(attributes, TCA_KIND).map(text)?;
    (handle != 0).then(|| Filter {
        priority: (info >> 16) as u16,
        handle,
        kind,
        name: find(options, TCA_BPF_NAME).map(text).unwrap_or_default(),
        prog_id: find(options, TCA_BPF_ID)
            .and_then(|id| u32_at(id, 0))
            .unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn the_error_of_a_kernel_without_clsact_names_module_and_option() {
        let refused =
            |errno| SyscallError::new("RTM_NEWQDISC of clsact", io::Error::from_raw_os_error(errno));
        let error = missing(
            refused(libc::ENOENT),
            "clsact qdisc",
            "sch_ingress",
            "CONFIG_NET_SCH_INGRESS",
        );
        let text = error.to_string();
        for part in [&kernel_release(), "sch_ingress", "CONFIG_NET_SCH_INGRESS"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(error.errno(), libc::ENOENT);
        let other = missing(
            refused(libc::EPERM),
            "clsact qdisc",
            "sch_ingress",
            "CONFIG_NET_SCH_INGRESS",
        );
        assert_eq!(other.call, "RTM_NEWQDISC of clsact");
    }
}
