//! The bpf(2) calls of these tests.
#![allow(unsafe_code, reason = "bpf(2)")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

const BPF_MAP_LOOKUP_ELEM: i64 = 1;
const BPF_MAP_UPDATE_ELEM: i64 = 2;
const BPF_MAP_DELETE_ELEM: i64 = 3;
const BPF_MAP_GET_NEXT_KEY: i64 = 4;
const BPF_PROG_TEST_RUN: i64 = 10;

#[repr(C)]
#[derive(Default)]
struct MapAttr {
    fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct TestAttr {
    fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    zero: u32,
}

fn bpf<T>(command: i64, attr: &mut T) -> io::Result<()> {
    // SAFETY: every pointer in `attr` is of a slice that outlives the call and has the size that the kernel expects.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr as *mut T, size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn map_attr(fd: BorrowedFd<'_>, key: &[u8], value: u64) -> MapAttr {
    MapAttr {
        fd: fd.as_raw_fd() as u32,
        key: key.as_ptr() as u64,
        value,
        ..MapAttr::default()
    }
}

pub fn update(fd: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    bpf(BPF_MAP_UPDATE_ELEM, &mut map_attr(fd, key, value.as_ptr() as u64))
}

pub fn delete(fd: BorrowedFd<'_>, key: &[u8]) -> io::Result<()> {
    bpf(BPF_MAP_DELETE_ELEM, &mut map_attr(fd, key, 0))
}

/// Returns the value of a key, `size` bytes.
pub fn lookup(fd: BorrowedFd<'_>, key: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut value = vec![0; size];
    let found = bpf(
        BPF_MAP_LOOKUP_ELEM,
        &mut map_attr(fd, key, value.as_mut_ptr() as u64),
    );
    found.is_ok().then_some(value)
}

/// Returns every key, `size` bytes each.
pub fn keys(fd: BorrowedFd<'_>, size: usize) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    let mut next = vec![0; size];
    let mut attr = map_attr(fd, &[], next.as_mut_ptr() as u64);
    attr.key = 0;
    while bpf(BPF_MAP_GET_NEXT_KEY, &mut attr).is_ok() {
        keys.push(next.clone());
        attr.key = keys.last().map_or(0, |key| key.as_ptr() as u64);
    }
    keys
}

/// Returns the number of values of a per-CPU map.
pub fn possible_cpus() -> usize {
    aya::util::nr_cpus().unwrap()
}

/// Runs a program. Returns its return value and the mean duration of one of `repeat` runs, ns.
pub fn test_run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    context: &[u8],
    repeat: u32,
) -> io::Result<(u32, u32)> {
    let mut attr = TestAttr {
        fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat,
        ctx_size_in: context.len() as u32,
        ctx_in: if context.is_empty() {
            0
        } else {
            context.as_ptr() as u64
        },
        ..TestAttr::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok((attr.retval, attr.duration))
}

/// Runs a program. Returns its return value and the resulting packet.
pub fn test_packet(program: BorrowedFd<'_>, frame: &[u8], context: &[u8]) -> io::Result<(u32, Vec<u8>)> {
    let (retval, out) = test_context(program, frame, context, &mut [])?;
    Ok((retval, out))
}

/// Runs a program. Returns its return value and the resulting packet, and writes the resulting context.
pub fn test_context(
    program: BorrowedFd<'_>,
    frame: &[u8],
    context: &[u8],
    context_out: &mut [u8],
) -> io::Result<(u32, Vec<u8>)> {
    let mut out = vec![0; frame.len() + 512];
    let mut attr = TestAttr {
        fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        ctx_size_in: context.len() as u32,
        ctx_in: if context.is_empty() {
            0
        } else {
            context.as_ptr() as u64
        },
        ctx_size_out: context_out.len() as u32,
        ctx_out: if context_out.is_empty() {
            0
        } else {
            context_out.as_mut_ptr() as u64
        },
        ..TestAttr::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok((attr.retval, out))
}
