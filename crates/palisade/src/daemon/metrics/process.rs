//! Metrics of the process, from `/proc/self` (proc_pid_stat(5)).

use std::fs;

use nix::{
    sys::{
        resource::{Resource, getrlimit},
        time::TimeValLike as _,
    },
    time::{ClockId, clock_gettime},
    unistd::{SysconfVar, sysconf},
};
use palisade_metrics::{Report, own};

/// Index of `utime` in the fields after the command in `/proc/self/stat`, of which the first is field 3.
const UTIME: usize = 14 - 3;
/// Index of `stime`.
const STIME: usize = 15 - 3;
/// Index of `num_threads`.
const THREADS: usize = 20 - 3;
/// Index of `starttime`, clock ticks after the boot.
const START: usize = 22 - 3;
/// Index of `vsize`, bytes.
const VIRTUAL: usize = 23 - 3;
/// Index of `rss`, pages.
const RESIDENT: usize = 24 - 3;

/// Adds the metrics. A value that cannot be read is left out.
pub(super) fn report(report: &mut Report) {
    let variable = |variable| sysconf(variable).ok().flatten().map(|value| value as f64);
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command can contain spaces and parentheses, so the fields are counted from the last parenthesis.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, fields)| fields.split_whitespace().collect())
        .unwrap_or_default();
    let field = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
    if let Some(ticks) = variable(SysconfVar::CLK_TCK) {
        if let (Some(user), Some(system)) = (field(UTIME), field(STIME)) {
            report.add(&own::PROCESS_CPU, &[], (user + system) / ticks);
        }
        let boot = |clock| {
            clock_gettime(clock)
                .ok()
                .map(|now| now.num_milliseconds() as f64 / 1e3)
        };
        let (now, up) = (boot(ClockId::CLOCK_REALTIME), boot(ClockId::CLOCK_BOOTTIME));
        if let (Some(start), Some(now), Some(up)) = (field(START), now, up) {
            report.add(&own::PROCESS_START, &[], now - up + start / ticks);
        }
    }
    if let (Some(pages), Some(size)) = (field(RESIDENT), variable(SysconfVar::PAGE_SIZE)) {
        report.add(&own::PROCESS_RESIDENT, &[], pages * size);
    }
    if let Some(bytes) = field(VIRTUAL) {
        report.add(&own::PROCESS_VIRTUAL, &[], bytes);
    }
    if let Some(threads) = field(THREADS) {
        report.add(&own::PROCESS_THREADS, &[], threads);
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // The directory that is being read is one of them.
        report.add(&own::PROCESS_FDS, &[], open.count().saturating_sub(1));
    }
    if let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        report.add(&own::PROCESS_MAX_FDS, &[], limit);
    }
}
