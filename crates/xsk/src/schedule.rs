//! How the kernel shares a processor between this thread and others.

use std::{io, ptr, time::Duration};

/// Makes the turns of this thread at a processor this long, and by that the wait for one short: the kernel lets
/// whoever asks for less go first (EEVDF, Linux 6.12; earlier ones take no notice). Its share stays the same.
///
/// # Errors
/// The kernel refuses; nothing has changed.
pub fn take_short_turns(slice: Duration) -> io::Result<()> {
    // SAFETY: all zeros is a value of this structure of integers.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // Niceness and policy are whoever's who started this program.
    // SAFETY: thread 0 is this one; the kernel writes at most `size` bytes into a value of that size.
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
    attributes.sched_runtime = u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX);
    // SAFETY: thread 0 is this one; the kernel reads as many bytes as the value says it has.
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
    fn the_kernel_takes_it() {
        let sched = thread::spawn(|| {
            take_short_turns(Duration::from_micros(200)).expect("no privilege is needed");
            fs::read_to_string("/proc/thread-self/sched").ok()
        });
        // Where the kernel shows it.
        if let Some(text) = sched.join().unwrap()
            && let Some(line) = text.lines().find(|line| line.starts_with("se.slice"))
        {
            assert!(line.ends_with("200000"), "{line}");
        }
    }
}
