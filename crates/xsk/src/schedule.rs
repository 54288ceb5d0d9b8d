//! Scheduling attributes of the calling thread. This module depends on nothing else in this crate; start at
//! [`set_sched_slice`].

use std::{io, ptr, time::Duration};

/// Requests an EEVDF slice for the calling thread (`sched_setattr(2)`, `sched_runtime`). A shorter slice gives an
/// earlier virtual deadline, so the thread waits less for a busy CPU; its share of CPU time stays the same. Kernels
/// before 6.12 ignore the request.
///
/// # Errors
/// `sched_getattr` or `sched_setattr` failed; the attributes are unchanged.
pub fn set_sched_slice(slice: Duration) -> io::Result<()> {
    change(|attributes| attributes.sched_runtime = nanoseconds(slice))
}

/// Sets the nice value of the calling thread and the policy `SCHED_BATCH`, with which a thread that becomes runnable
/// does not preempt the running one, and requests an EEVDF slice as [`set_sched_slice`]. Threads that the calling thread
/// starts afterwards inherit these attributes.
///
/// # Errors
/// `sched_getattr` or `sched_setattr` failed; the attributes are unchanged.
pub fn set_batch(nice: i32, slice: Duration) -> io::Result<()> {
    change(|attributes| {
        attributes.sched_policy = libc::SCHED_BATCH as u32;
        attributes.sched_nice = nice;
        attributes.sched_runtime = nanoseconds(slice);
    })
}

fn nanoseconds(slice: Duration) -> u64 {
    u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX)
}

/// Changes scheduling attributes of the calling thread.
fn change(set: impl FnOnce(&mut libc::sched_attr)) -> io::Result<()> {
    // SAFETY: the structure consists of integers, for which all zeros is a valid value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // Read the attributes first, so that the call below keeps those that `set` does not change. SAFETY: the kernel
    // writes at most `size` bytes into `attributes`, which has that size. Thread ID 0 means the calling thread.
    if unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            0,
            ptr::from_mut(&mut attributes),
            size,
            0,
        )
    } != 0
    {
        return Err(io::Error::last_os_error());
    }
    attributes.size = size;
    set(&mut attributes);
    // SAFETY: the kernel reads `attributes.size` bytes, which is the size of `attributes`. Thread ID 0 means the
    // calling thread.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, ptr::from_ref(&attributes), 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;

    #[test]
    fn the_policy_for_background_work_is_set_without_privileges() {
        // SAFETY: the call has no preconditions; thread ID 0 means the calling thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        thread::spawn(move || {
            set_batch(19, Duration::from_micros(100)).expect("sched_setattr");
            assert_eq!(policy(), libc::SCHED_BATCH);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_kernel_accepts_the_slice_without_privileges() {
        let sched = thread::spawn(|| {
            set_sched_slice(Duration::from_micros(200)).expect("sched_setattr");
            fs::read_to_string("/proc/thread-self/sched").ok()
        });
        // Only kernels with CONFIG_SCHED_DEBUG and EEVDF slices show the value.
        if let Some(text) = sched.join().unwrap()
            && let Some(line) = text.lines().find(|line| line.starts_with("se.slice"))
        {
            assert!(line.ends_with("200000"), "{line}");
        }
    }
}
