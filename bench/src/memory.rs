//! Memory use, counted at the allocator; memory of other processes.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    sync::atomic::{AtomicBool, AtomicIsize, Ordering::Relaxed},
};

use anyhow::{Context as _, Result};

static COUNTING: AtomicBool = AtomicBool::new(false);
static NOW: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

/// The system's allocator. Counts while [`count`] runs; otherwise it costs a load and a branch.
pub struct Counting;

fn add(bytes: isize) {
    if COUNTING.load(Relaxed) {
        let now = NOW.fetch_add(bytes, Relaxed) + bytes;
        PEAK.fetch_max(now, Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size().cast_signed());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        add(-layout.size().cast_signed());
        // SAFETY: the pointer came from `alloc` of this allocator, so from the system's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(size.cast_signed() - layout.size().cast_signed());
        // SAFETY: as above; the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Returns the result of `f`, the bytes in use after it, and the peak during it, in excess of those before; of all threads.
pub fn count<T>(f: impl FnOnce() -> T) -> (T, f64, f64) {
    NOW.store(0, Relaxed);
    PEAK.store(0, Relaxed);
    COUNTING.store(true, Relaxed);
    let value = f();
    COUNTING.store(false, Relaxed);
    (value, NOW.load(Relaxed) as f64, PEAK.load(Relaxed) as f64)
}

/// Returns the resident memory of a process, bytes.
pub fn resident(pid: u32) -> Result<f64> {
    of_process(pid, "VmRSS")
}

/// Returns the largest resident memory that a process has had since its program began, bytes.
pub fn peak_resident(pid: u32) -> Result<f64> {
    of_process(pid, "VmHWM")
}

/// Returns a value of `/proc/PID/status`, bytes.
fn of_process(pid: u32, name: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    Ok(kib.with_context(|| format!("no {name}"))? * 1024.0)
}
