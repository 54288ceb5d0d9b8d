//! bpf(2). Attributes are declared up to the last field in use; the kernel treats the missing rest of an attribute as
//! zero.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::SyscallError;

type Result<T> = std::result::Result<T, SyscallError>;

/// Commands of bpf(2) (`enum bpf_cmd`).
mod cmd {
    pub(super) const MAP_CREATE: libc::c_int = 0;
    pub(super) const MAP_LOOKUP_ELEM: libc::c_int = 1;
    pub(super) const MAP_UPDATE_ELEM: libc::c_int = 2;
    pub(super) const MAP_DELETE_ELEM: libc::c_int = 3;
    pub(super) const MAP_GET_NEXT_KEY: libc::c_int = 4;
    pub(super) const OBJ_PIN: libc::c_int = 6;
    pub(super) const OBJ_GET: libc::c_int = 7;
    pub(super) const PROG_GET_FD_BY_ID: libc::c_int = 13;
    pub(super) const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    pub(super) const PROG_QUERY: libc::c_int = 16;
    pub(super) const MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
    pub(super) const MAP_LOOKUP_BATCH: libc::c_int = 24;
    pub(super) const MAP_UPDATE_BATCH: libc::c_int = 26;
    pub(super) const MAP_DELETE_BATCH: libc::c_int = 27;
    pub(super) const LINK_CREATE: libc::c_int = 28;
    pub(super) const LINK_UPDATE: libc::c_int = 29;
    pub(super) const LINK_DETACH: libc::c_int = 34;
}

/// Map types (`enum bpf_map_type`) that the programs use.
pub(crate) mod map_type {
    pub(crate) const HASH: u32 = 1;
    pub(crate) const ARRAY: u32 = 2;
    pub(crate) const PERCPU_ARRAY: u32 = 6;
    pub(crate) const LRU_HASH: u32 = 9;
    pub(crate) const LPM_TRIE: u32 = 11;
    pub(crate) const ARRAY_OF_MAPS: u32 = 12;
    pub(crate) const RINGBUF: u32 = 27;

    /// Returns the name of a map type without its prefix `BPF_MAP_TYPE_`.
    pub(crate) fn name(map_type: u32) -> String {
        match map_type {
            HASH => "HASH".into(),
            ARRAY => "ARRAY".into(),
            PERCPU_ARRAY => "PERCPU_ARRAY".into(),
            LRU_HASH => "LRU_HASH".into(),
            LPM_TRIE => "LPM_TRIE".into(),
            ARRAY_OF_MAPS => "ARRAY_OF_MAPS".into(),
            RINGBUF => "RINGBUF".into(),
            other => format!("map type {other}"),
        }
    }
}

/// Update flag: fail with EEXIST if the key exists.
pub(crate) const BPF_NOEXIST: u64 = 1;
/// Attach flag of tcx: without a relative program, the new program runs before all others of the hook.
pub(crate) const BPF_F_BEFORE: u32 = 1 << 3;
/// Attach flag: native XDP.
pub(crate) const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
/// Attach flag: generic XDP.
pub(crate) const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
/// ENOTSUPP of the kernel, which is not a POSIX error and is missing in libc.
pub(crate) const ENOTSUPP: i32 = 524;

/// Attach type of a link (`enum bpf_attach_type`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum AttachType {
    Xdp = 37,
    SkLookup = 36,
    TcxIngress = 46,
    TcxEgress = 47,
}

#[repr(C)]
#[derive(IntoBytes, Immutable, FromZeros)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

#[repr(C)]
#[derive(IntoBytes, Immutable, FromZeros)]
struct Elem {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(IntoBytes, FromBytes, Immutable, KnownLayout)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(IntoBytes, Immutable, FromZeros)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(IntoBytes, Immutable, FromZeros)]
struct ObjectInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(IntoBytes, FromBytes, Immutable, KnownLayout)]
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

#[repr(C)]
#[derive(IntoBytes, Immutable, FromZeros)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    zero: u32,
    expected_revision: u64,
}

#[repr(C)]
#[derive(IntoBytes, Immutable, FromZeros)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// First fields of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct MapInfo {
    pub map_type: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
    pub name: [u8; 16],
}

/// First fields of `struct bpf_link_info`. For XDP and tcx, `ifindex` is 0 after the device was deleted or the link was
/// detached.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct LinkInfo {
    pub link_type: u32,
    pub id: u32,
    pub prog_id: u32,
    zero: u32,
    pub ifindex: u32,
    pub attach_type: u32,
}

/// First fields of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct ProgInfo {
    prog_type: u32,
    id: u32,
    tag: [u8; 8],
    lengths: [u32; 2],
    pointers: [u64; 2],
    load_time: u64,
    created_by_uid: u32,
    map_count: u32,
    map_ids: u64,
    name: [u8; 16],
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // No truncation: a file descriptor is never negative.
    fd.as_raw_fd() as u32
}

/// Calls bpf(2).
///
/// # Safety
/// Every pointer in `attr` must be valid for what the command reads or writes through it.
unsafe fn bpf<A>(command: libc::c_int, attr: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live object of the given size; the caller guarantees the pointers in it.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// Calls bpf(2) with a command that returns a new file descriptor.
///
/// # Safety
/// Every pointer in `attr` must be valid as for [`bpf`], and the command must return a new file descriptor.
unsafe fn bpf_fd<A>(command: libc::c_int, attr: &mut A) -> io::Result<OwnedFd> {
    // SAFETY: the caller guarantees the pointers in `attr`.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the command returned a new file descriptor, which no other value owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the path contains a zero byte"))
}

/// Creates a map. The name is truncated to 15 bytes.
pub(crate) fn map_create(
    name: &str,
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
) -> Result<OwnedFd> {
    create(
        name,
        map_type,
        [key_size, value_size, max_entries, map_flags],
        None,
    )
}

/// Waits until all runs of BPF programs that have begun before have ended, so that what was written to maps before holds
/// for all packets.
///
/// The system call that changes a map of maps waits for an RCU grace period (`maybe_wait_bpf_programs` in
/// kernel/bpf/syscall.c), for this purpose; programs at XDP and tc hooks run in RCU read-side critical sections.
///
/// # Errors
/// The maps cannot be created or written; it is then not known whether the runs have ended.
pub(crate) fn wait_for_programs() -> Result<()> {
    let inner = map_create("palisade_wait", map_type::ARRAY, 4, 4, 1, 0)?;
    let outer = create(
        "palisade_wait",
        map_type::ARRAY_OF_MAPS,
        [4, 4, 1, 0],
        Some(inner.as_fd()),
    )?;
    let value = inner.as_raw_fd().to_ne_bytes();
    update(outer.as_fd(), &0_u32.to_ne_bytes(), &value, 0)
}

fn create(
    name: &str,
    map_type: u32,
    [key_size, value_size, max_entries, map_flags]: [u32; 4],
    inner: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd> {
    let mut map_name = [0; 16];
    for (to, from) in map_name[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let mut attr = MapCreate {
        map_type,
        key_size,
        value_size,
        max_entries,
        map_flags,
        inner_map_fd: inner.map_or(0, |inner| inner.as_raw_fd().cast_unsigned()),
        numa_node: 0,
        map_name,
    };
    // SAFETY: the attribute has no pointers, and the command returns a new descriptor.
    unsafe { bpf_fd(cmd::MAP_CREATE, &mut attr) }
        .map_err(|e| SyscallError::new(format!("BPF_MAP_CREATE of {name}, {max_entries} entries"), e))
}

/// Pins a map, program or link.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let call = || format!("BPF_OBJ_PIN at {}", path.display());
    let c_path = c_path(path).map_err(|e| SyscallError::new(call(), e))?;
    let mut attr = Object {
        pathname: c_path.as_ptr() as u64,
        bpf_fd: raw(fd),
        file_flags: 0,
    };
    // SAFETY: the path lives until the call returns.
    unsafe { bpf(cmd::OBJ_PIN, &mut attr) }.map_err(|e| SyscallError::new(call(), e))?;
    Ok(())
}

/// Opens a pinned map, program or link; `None` if the path does not exist.
pub(crate) fn get_pinned(path: &Path) -> Result<Option<OwnedFd>> {
    let call = || format!("BPF_OBJ_GET of {}", path.display());
    let c_path = c_path(path).map_err(|e| SyscallError::new(call(), e))?;
    let mut attr = Object {
        pathname: c_path.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: the path lives until the call returns, and the command returns a new descriptor.
    match unsafe { bpf_fd(cmd::OBJ_GET, &mut attr) } {
        Ok(fd) => Ok(Some(fd)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(SyscallError::new(call(), e)),
    }
}

fn object_info<T: FromBytes + IntoBytes + KnownLayout>(fd: BorrowedFd<'_>) -> Result<T> {
    let mut info = T::new_zeroed();
    let mut attr = ObjectInfo {
        bpf_fd: raw(fd),
        info_len: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: `info` is valid for `info_len` bytes, and every bit pattern is a valid value of `T`.
    unsafe { bpf(cmd::OBJ_GET_INFO_BY_FD, &mut attr) }
        .map_err(|e| SyscallError::new("BPF_OBJ_GET_INFO_BY_FD", e))?;
    Ok(info)
}

pub(crate) fn map_info(fd: BorrowedFd<'_>) -> Result<MapInfo> {
    object_info(fd)
}

pub(crate) fn link_info(fd: BorrowedFd<'_>) -> Result<LinkInfo> {
    object_info(fd)
}

fn elem(map: BorrowedFd<'_>, key: &[u8], value: u64, flags: u64) -> Elem {
    Elem {
        map_fd: raw(map),
        zero: 0,
        key: key.as_ptr() as u64,
        value,
        flags,
    }
}

/// Reads one element into `value`. Returns whether the key exists.
///
/// `key` and `value` must have the key and value size of the map; for per-CPU maps `value` holds the values of all
/// CPUs. [`crate::maps`] checks the sizes.
pub(crate) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> Result<bool> {
    let mut attr = elem(map, key, value.as_mut_ptr() as u64, 0);
    // SAFETY: the buffers have the map's key and value size.
    found(
        unsafe { bpf(cmd::MAP_LOOKUP_ELEM, &mut attr) },
        "BPF_MAP_LOOKUP_ELEM",
    )
}

/// Reads and deletes one element in one system call. Returns whether the key existed.
pub(crate) fn lookup_and_delete(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> Result<bool> {
    let mut attr = elem(map, key, value.as_mut_ptr() as u64, 0);
    // SAFETY: the buffers have the map's key and value size.
    found(
        unsafe { bpf(cmd::MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) },
        "BPF_MAP_LOOKUP_AND_DELETE_ELEM",
    )
}

pub(crate) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> Result<()> {
    let mut attr = elem(map, key, value.as_ptr() as u64, flags);
    // SAFETY: the buffers have the map's key and value size, and the kernel only reads them.
    unsafe { bpf(cmd::MAP_UPDATE_ELEM, &mut attr) }
        .map_err(|e| SyscallError::new("BPF_MAP_UPDATE_ELEM", e))?;
    Ok(())
}

/// Deletes one element. Returns whether the key existed.
pub(crate) fn delete(map: BorrowedFd<'_>, key: &[u8]) -> Result<bool> {
    let mut attr = elem(map, key, 0, 0);
    // SAFETY: the buffer has the map's key size, and the kernel only reads it.
    found(
        unsafe { bpf(cmd::MAP_DELETE_ELEM, &mut attr) },
        "BPF_MAP_DELETE_ELEM",
    )
}

/// Writes to `next` the key after `key`, or the first key if `key` is `None`. Returns whether there is such a key.
pub(crate) fn next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> Result<bool> {
    let mut attr = Elem {
        map_fd: raw(map),
        zero: 0,
        key: key.map_or(0, |k| k.as_ptr() as u64),
        value: next.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: both buffers have the map's key size.
    found(
        unsafe { bpf(cmd::MAP_GET_NEXT_KEY, &mut attr) },
        "BPF_MAP_GET_NEXT_KEY",
    )
}

fn found(answer: io::Result<libc::c_long>, call: &str) -> Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(SyscallError::new(call, e)),
    }
}

/// Result of a batch call.
#[derive(Debug)]
pub(crate) struct BatchOutcome {
    /// Number of processed elements.
    pub done: usize,
    /// Error that ended the batch.
    pub error: Option<SyscallError>,
}

fn batch(command: libc::c_int, call: &str, attr: &mut Batch) -> BatchOutcome {
    let asked = attr.count;
    // SAFETY: the callers below pass buffers for `count` keys and values.
    let error = unsafe { bpf(command, attr) }.err();
    let done = match error.as_ref().map(|e| e.raw_os_error().unwrap_or(0)) {
        // A lookup writes the count if it ends with success, with ENOENT at the end of the map, or with ENOSPC.
        None => attr.count,
        Some(libc::ENOENT | libc::ENOSPC) if command == cmd::MAP_LOOKUP_BATCH => attr.count,
        // An update or deletion that fails at an element writes the number of elements before it. A call that the
        // kernel refuses as a whole writes nothing, so `attr.count` is still the requested count.
        Some(_) if attr.count < asked => attr.count,
        Some(_) => 0,
    };
    BatchOutcome {
        done: done as usize,
        error: error.map(|e| SyscallError::new(call, e)),
    }
}

/// Writes `count` elements from contiguous keys and values.
pub(crate) fn update_batch(map: BorrowedFd<'_>, keys: &[u8], values: &[u8], count: u32) -> BatchOutcome {
    let mut attr = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count,
        map_fd: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    batch(cmd::MAP_UPDATE_BATCH, "BPF_MAP_UPDATE_BATCH", &mut attr)
}

/// Deletes `count` contiguous keys. Stops at the first key that does not exist.
pub(crate) fn delete_batch(map: BorrowedFd<'_>, keys: &[u8], count: u32) -> BatchOutcome {
    let mut attr = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: 0,
        count,
        map_fd: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    batch(cmd::MAP_DELETE_BATCH, "BPF_MAP_DELETE_BATCH", &mut attr)
}

/// Reads up to `count` elements from the position `cursor` (`None`: the beginning) and writes the next position to
/// `next`. At the end of the map the error is ENOENT, and the elements that the call has read are valid.
pub(crate) fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: Option<&[u8]>,
    next: &mut [u8],
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> BatchOutcome {
    let mut attr = Batch {
        in_batch: cursor.map_or(0, |c| c.as_ptr() as u64),
        out_batch: next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map_fd: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    batch(cmd::MAP_LOOKUP_BATCH, "BPF_MAP_LOOKUP_BATCH", &mut attr)
}

/// Attaches a program to an interface by a link. The kernel detaches the program when the last descriptor and the last
/// pin of the link are gone.
pub(crate) fn link_create(
    prog: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: AttachType,
    flags: u32,
) -> Result<OwnedFd> {
    let mut attr = LinkCreate {
        prog_fd: raw(prog),
        target_ifindex: ifindex,
        attach_type: attach_type as u32,
        flags,
        relative_fd: 0,
        zero: 0,
        expected_revision: 0,
    };
    // SAFETY: the attribute has no pointers, and the command returns a new descriptor.
    unsafe { bpf_fd(cmd::LINK_CREATE, &mut attr) }.map_err(|e| {
        SyscallError::new(
            format!("BPF_LINK_CREATE of {attach_type:?} at interface {ifindex}"),
            e,
        )
    })
}

/// Attaches an sk_lookup program to a network namespace.
pub(crate) fn link_create_netns(prog: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> Result<OwnedFd> {
    // The kernel reads the descriptor of the namespace where it reads the index of an interface for other types.
    link_create(prog, raw(netns), AttachType::SkLookup, 0)
}

/// Replaces the program of a link atomically.
pub(crate) fn link_update(link: BorrowedFd<'_>, prog: BorrowedFd<'_>) -> Result<()> {
    let mut attr = LinkUpdate {
        link_fd: raw(link),
        new_prog_fd: raw(prog),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: the attribute has no pointers.
    unsafe { bpf(cmd::LINK_UPDATE, &mut attr) }.map_err(|e| SyscallError::new("BPF_LINK_UPDATE", e))?;
    Ok(())
}

/// Detaches the program of a link, even if other processes or pins hold the link.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> Result<()> {
    let mut link_fd = raw(link);
    // SAFETY: the attribute is the descriptor alone.
    unsafe { bpf(cmd::LINK_DETACH, &mut link_fd) }.map_err(|e| SyscallError::new("BPF_LINK_DETACH", e))?;
    Ok(())
}

/// Returns the ids of the links at a tcx hook in the order in which their programs run; 0 for a program without a
/// link. The error is EINVAL if the kernel has no tcx.
pub(crate) fn tcx_query(ifindex: u32, attach_type: AttachType) -> Result<Vec<u32>> {
    tcx_ids(ifindex, attach_type).map(|(_, links)| links)
}

/// Returns the ids of the programs at a tcx hook in the order in which they run. The error is EINVAL if the kernel has
/// no tcx.
pub(crate) fn tcx_programs(ifindex: u32, attach_type: AttachType) -> Result<Vec<u32>> {
    tcx_ids(ifindex, attach_type).map(|(programs, _)| programs)
}

/// Returns the ids of programs and links at a tcx hook.
fn tcx_ids(ifindex: u32, attach_type: AttachType) -> Result<(Vec<u32>, Vec<u32>)> {
    let mut prog_ids = [0_u32; 64];
    let mut link_ids = [0_u32; 64];
    let mut attr = ProgQuery {
        target_ifindex: ifindex,
        attach_type: attach_type as u32,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: prog_ids.as_mut_ptr() as u64,
        count: prog_ids.len() as u32,
        zero: 0,
        prog_attach_flags: 0,
        link_ids: link_ids.as_mut_ptr() as u64,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: both arrays have `count` elements. A hook has at most 63 programs (BPF_MPROG_MAX is 64).
    match unsafe { bpf(cmd::PROG_QUERY, &mut attr) } {
        Ok(_) => {}
        // No program is attached to the hook.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok((Vec::new(), Vec::new())),
        Err(e) => {
            let call = format!("BPF_PROG_QUERY of {attach_type:?} at interface {ifindex}");
            return Err(SyscallError::new(call, e));
        }
    }
    let count = (attr.count as usize).min(link_ids.len());
    Ok((prog_ids[..count].to_vec(), link_ids[..count].to_vec()))
}

/// Returns whether the kernel has tcx.
pub(crate) fn has_tcx(ifindex: u32) -> Result<bool> {
    match tcx_query(ifindex, AttachType::TcxIngress) {
        Ok(_) => Ok(true),
        Err(e) if e.errno() == libc::EINVAL => Ok(false),
        Err(e) => Err(e),
    }
}

/// Returns the name of a program by its id; `None` if the program is gone or the query fails.
pub(crate) fn program_name(id: u32) -> Option<String> {
    let mut attr = [id, 0, 0];
    // SAFETY: the attribute has no pointers, and the command returns a new descriptor.
    let prog = unsafe { bpf_fd(cmd::PROG_GET_FD_BY_ID, &mut attr) }.ok()?;
    let info: ProgInfo = object_info(prog.as_fd()).ok()?;
    let end = info.name.iter().position(|&b| b == 0).unwrap_or(info.name.len());
    Some(String::from_utf8_lossy(&info.name[..end]).into_owned())
}

/// Duplicates a descriptor.
pub(crate) fn duplicate(fd: &impl AsFd) -> Result<OwnedFd> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|e| SyscallError::new("dup", e))
}
