//! `palisade capture`: attaches the programs of a capture for one client, and sends pcapng blocks until the client or a
//! bound ends the capture.

use std::{
    io,
    os::fd::AsFd as _,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use palisade_abi::CaptureSettings;
use palisade_datapath::{Capture, monotonic_coarse};
use palisade_flowlog::{FilterBuilder, Filters, Timestamp};
use tracing::{error, info};

use super::{CHANGE_DEADLINE, Handlers};
use crate::{
    control::{
        ALIVE_INTERVAL,
        api::{Answer, CaptureRequest, CaptureStatus, CaptureSummary},
        server::Sink,
    },
    daemon::{
        capture::{Bounds, Recorder, Snap, settings},
        capturing::CapturePlace,
        events::clock_offset,
        message::{ClientRequest, Message, Reply},
    },
};

/// Size of the ring of a capture, bytes. At 10 Gbit/s of packets of 1,514 bytes it holds the headers of 15 ms (512
/// bytes are copied of each packet), or the whole packets of 6 ms.
const RING_BYTES: u32 = 8 << 20;
/// Longest wait for a packet before the client and the bounds are checked.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Largest number of records that are read between two checks.
const MAX_BATCH: usize = 512;
/// Longest capture.
const MAX_DURATION: Duration = Duration::from_secs(24 * 3600);

/// Returns filters as options of the command line.
fn options(filters: &[(String, String)]) -> String {
    let option = |(flag, value): &(String, String)| {
        if value.is_empty() {
            format!("--{flag}")
        } else {
            format!("--{flag} {value}")
        }
    };
    filters.iter().map(option).collect::<Vec<_>>().join(" ")
}

/// Ends a capture when it is dropped: the ordinary programs are attached again, and another capture can begin.
struct Running<'a> {
    handlers: &'a Handlers,
    place: &'a CapturePlace,
    /// The capture, once its programs can be attached.
    capture: Option<Capture>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(capture) = &self.capture {
            // If the programs cannot be replaced, they must not copy packets into a ring that has no reader.
            if let Err(problem) = capture.set(&CaptureSettings::all(0, 1)) {
                error!(error = %problem, "the programs cannot be told that a capture has ended");
            }
            let (reply, receiver) = Reply::channel();
            let request = Message::Client(ClientRequest::EndCapture(reply));
            // Without a control thread the daemon is ending, which ends the capture too.
            if self.handlers.control.send(request).is_ok() {
                match receiver.recv_timeout(CHANGE_DEADLINE) {
                    Ok(Ok(())) => {}
                    Ok(Err(problem)) => error!(
                        error = problem,
                        "the programs of a capture could not be replaced; they enforce the policy and copy nothing, and the \
                         replacement is retried"
                    ),
                    Err(problem) => error!(error = %problem, "the end of a capture was not confirmed"),
                }
            }
        }
        self.place.free();
    }
}

impl Handlers {
    pub(super) fn capture(&self, request: &CaptureRequest, sink: &mut dyn Sink) -> io::Result<()> {
        match self.run_capture(request, sink) {
            Ok(summary) => sink.send(&Answer::Ok(serde_json::to_value(summary)?)),
            Err(Failure::Refused(why)) => sink.send(&Answer::Error(why)),
            Err(Failure::Client(error)) => Err(error),
        }
    }

    fn run_capture(&self, request: &CaptureRequest, sink: &mut dyn Sink) -> Result<CaptureSummary, Failure> {
        let refused = |why: &str| Failure::Refused(why.to_owned());
        let mut builder = FilterBuilder::new(Timestamp::from_system_time(SystemTime::now()));
        let (api_filters, filters) = request
            .filters
            .iter()
            .try_for_each(|(flag, value)| builder.flag(flag, value))
            .and_then(|()| builder.finish_api())
            .and_then(|api| Ok((Filters::compile(&api)?, api)))
            .map(|(filters, api)| (api, filters))
            .map_err(|error| Failure::Refused(error.to_string()))?;
        let status = CaptureStatus {
            filters: options(&request.filters),
            since: Timestamp::from_system_time(SystemTime::now()),
            ..CaptureStatus::default()
        };
        if !self.capturing.take(status) {
            return Err(refused("another capture runs; only one can run at a time"));
        }
        let mut running = Running {
            handlers: self,
            place: &self.capturing,
            capture: None,
        };
        if !sink.follow() {
            return Err(refused(
                "too many clients follow flows at the same time; end one of them",
            ));
        }
        let snap = request.snap_length.map_or(Snap::Headers, Snap::Bytes);
        let duration = Duration::from_millis(request.duration_ms).min(MAX_DURATION);
        let node = Arc::clone(&self.shared.get().node);
        let ifindex = |name: &str| {
            let view = self.shared.get();
            let found = view.interfaces.iter().find(|(_, known)| &***known == name);
            found.map(|(ifindex, _)| *ifindex)
        };
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let until = monotonic_coarse().saturating_add(nanoseconds);
        let mut wanted = settings(&api_filters, snap, until, ifindex);
        // The verifier can take seconds, and the control thread can be busy: the client must not give up.
        sink.send(&Answer::Alive)?;
        let capture = self
            .datapath
            .prepare_capture(&wanted, RING_BYTES)
            .map_err(|error| Failure::Refused(error.to_string()))?;
        sink.send(&Answer::Alive)?;
        let records = self.ring.follow();
        // From here on the programs can be attached, even if the answer comes too late.
        let capture = running.capture.insert(capture);
        let programs = capture.programs();
        self.change(|reply| ClientRequest::BeginCapture(programs, reply))
            .map_err(Failure::Refused)?;
        info!(filters = ?request.filters, ?snap, ?duration, "a capture begins");

        let description = format!("palisade capture on {node}");
        let bounds = Bounds {
            packets: request.count.unwrap_or(u64::MAX),
            bytes: request.max_bytes.unwrap_or(u64::MAX),
        };
        let mut recorder = Recorder::new(
            filters,
            snap,
            bounds,
            Arc::clone(&self.shared),
            clock_offset(),
            records,
            &description,
        );
        send(sink, &recorder.take())?;
        let began = Instant::now();
        let mut said = Instant::now();
        let ended = loop {
            let mut fds = [PollFd::new(capture.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(POLL_INTERVAL).unwrap_or(PollTimeout::ZERO);
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(Failure::Refused(format!("the ring cannot be polled: {error}"))),
            }
            if recorder.refresh(clock_offset()) {
                // An interface that was recreated has another index.
                wanted = settings(&api_filters, snap, until, ifindex);
                if let Err(problem) = capture.set(&wanted) {
                    return Err(Failure::Refused(problem.to_string()));
                }
            }
            drain(capture, &mut recorder);
            let blocks = recorder.take();
            if !blocks.is_empty() {
                send(sink, &blocks)?;
                said = Instant::now();
            }
            let lost = capture.lost().unwrap_or_default();
            let lost = lost.saturating_add(recorder.undescribed());
            self.capturing.note(recorder.written(), lost);
            if recorder.is_full() {
                break "bound";
            }
            if began.elapsed() >= duration {
                break "duration";
            }
            if sink.closed() {
                break "client";
            }
            if said.elapsed() >= ALIVE_INTERVAL {
                sink.send(&Answer::Alive)?;
                said = Instant::now();
            }
        };
        // No program copies packets after this, so the ring becomes empty.
        wanted.until = 0;
        if let Err(problem) = capture.set(&wanted) {
            error!(error = %problem, "the end of a capture cannot be written to the map of its settings");
        }
        while !recorder.is_full() && drain(capture, &mut recorder) {
            send(sink, &recorder.take())?;
        }
        recorder.write(true);
        send(sink, &recorder.take())?;
        let lost = capture.lost().unwrap_or_default();
        let lost = lost.saturating_add(recorder.undescribed());
        send(sink, &recorder.statistics(lost))?;
        let (packets, bytes) = recorder.written();
        self.capturing.note((packets, bytes), lost);
        info!(packets, bytes, lost, ended, "a capture has ended");
        drop(running);
        Ok(CaptureSummary {
            packets,
            bytes,
            lost,
            ended: ended.to_owned(),
        })
    }
}

/// Why a capture has no summary.
enum Failure {
    /// It was refused or failed, for this reason.
    Refused(String),
    /// The client has gone or does not read.
    Client(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Client(error)
    }
}

/// Takes packets from the ring, adds the verdicts of inspectors, and writes what is complete. Returns whether more packets
/// are in the ring.
fn drain(capture: &mut Capture, recorder: &mut Recorder) -> bool {
    let begun = Timestamp::from_system_time(SystemTime::now());
    let is_more = capture.drain(MAX_BATCH, |header, bytes| recorder.record(header, bytes)) == MAX_BATCH;
    // A packet is in this ring before a worker gets it, so the packets of all verdicts until then were taken.
    let until = if is_more {
        recorder.last_taken()
    } else {
        Some(begun)
    };
    if let Some(until) = until {
        recorder.decide(until);
    }
    recorder.write(false);
    is_more
}

/// Sends blocks, if there are any.
fn send(sink: &mut dyn Sink, blocks: &[u8]) -> io::Result<()> {
    if blocks.is_empty() {
        return Ok(());
    }
    sink.send(&Answer::Capture(BASE64_STANDARD.encode(blocks)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_shown_as_options() {
        let filters = [("verdict", "dropped"), ("not", "")].map(|(flag, value)| (flag.into(), value.into()));
        assert_eq!(options(&filters), "--verdict dropped --not");
    }
}
