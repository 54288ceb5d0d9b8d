//! Streams of responses. A stream reads the ring when the connection asks for the next response, so a slow client costs
//! no more than its position in the ring.

use std::{
    future::Future as _,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use palisade_flowlog::{Filters, Item, Lost, LostSource, Ring, Timestamp, Uuid};
use tokio::sync::futures::OwnedNotified;
use tokio_stream::Stream;
use tonic::Status;

use crate::{
    agent::AgentRing,
    convert,
    mask::Mask,
    namespaces::Namespaces,
    range::{Range, Reader, Source, Step, Turn},
    readers::Place,
    wake::{Follower, Wake},
    wire::Encoded,
};

/// Number of flows whose response is kept for other readers.
const SHARED_FLOWS: usize = 1_024;
/// Events that a stream looks at before it lets other tasks run.
const TURN_EVENTS: usize = 256;
/// Time after which a stream lets other tasks run: filters choose the cost of an event.
const TURN_TIME: Duration = Duration::from_millis(1);

impl Source for Ring {
    type Event = Item;

    fn first(&self) -> u64 {
        self.oldest_number()
    }

    fn next(&self) -> u64 {
        self.seen()
    }

    fn get(&self, number: u64) -> Option<Item> {
        self.item(number)
    }

    fn time(item: &Item) -> Timestamp {
        match item {
            Item::Flow(flow) => flow.time,
            Item::Lost(_, time) => *time,
        }
    }

    fn counts(item: &Item) -> bool {
        matches!(item, Item::Flow(_))
    }
}

/// Makes the responses of a stream.
pub(crate) trait Responses<S: Source>: Unpin {
    /// Returns whether the client wants the event.
    fn wants(&self, event: &S::Event) -> bool;
    /// Returns the response with an event.
    fn event(&self, event: S::Event) -> Encoded;
    /// Returns the response that says how many events were lost; `None` if the API has none.
    fn lost(&self, count: u64) -> Option<Encoded>;
}

/// Stream of the events of a ring.
pub(crate) struct Events<S: Source, R> {
    source: Arc<S>,
    reader: Reader,
    responses: R,
    place: Place,
    wake: Arc<Wake>,
    _follower: Option<Follower>,
    waiting: Option<Pin<Box<OwnedNotified>>>,
}

impl<S: Source, R: Responses<S>> Events<S, R> {
    pub(crate) fn new(source: &Arc<S>, range: Range, responses: R, place: Place, wake: &Arc<Wake>) -> Self {
        Self {
            source: Arc::clone(source),
            reader: Reader::new(&**source, range),
            responses,
            place,
            wake: Arc::clone(wake),
            _follower: range.follow.then(|| wake.follow()),
            waiting: None,
        }
    }
}

impl<S: Source, R: Responses<S>> Stream for Events<S, R> {
    type Item = Result<Encoded, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Err(status) = this.place.progress() {
            return Poll::Ready(Some(Err(status)));
        }
        loop {
            if let Some(waiting) = &mut this.waiting {
                if waiting.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                this.waiting = None;
            }
            // The notification is made before the ring is read, so that no new event is missed.
            let waiting = Arc::clone(this.wake.notify()).notified_owned();
            let now = Timestamp::from_system_time(SystemTime::now());
            let responses = &this.responses;
            let turn = Turn::new(TURN_EVENTS, TURN_TIME);
            let step = this
                .reader
                .step(&*this.source, now, turn, |event| responses.wants(event));
            match step {
                Step::Event(event) => return Poll::Ready(Some(Ok(this.responses.event(event)))),
                Step::Lost(count) => {
                    this.place.lost(count);
                    if let Some(response) = this.responses.lost(count) {
                        return Poll::Ready(Some(Ok(response)));
                    }
                }
                Step::Wait => this.waiting = Some(Box::pin(waiting)),
                Step::End => return Poll::Ready(None),
                Step::Busy => {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
    }
}

/// Responses with the flows that were sent last, so that a flow is encoded once for all readers at about the same
/// position in the ring.
#[derive(Debug)]
pub(crate) struct Shared(Box<[Mutex<(Uuid, Encoded)>]>);

impl Default for Shared {
    fn default() -> Self {
        let none = || Mutex::new((Uuid::None, Encoded(Bytes::new())));
        Self((0..SHARED_FLOWS).map(|_| none()).collect())
    }
}

impl Shared {
    fn get_or_make(&self, uuid: &Uuid, make: impl FnOnce() -> Encoded) -> Encoded {
        let Uuid::Number(number) = uuid else {
            return make();
        };
        // No truncation: the remainder is less than the number of slots.
        let slot = &self.0[(number % self.0.len() as u128) as usize];
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        // The lock is held while the flow is encoded, so that another reader waits for the result.
        if slot.0 != *uuid {
            *slot = (uuid.clone(), make());
        }
        slot.1.clone()
    }
}

/// Responses with flows.
pub(crate) struct Flows {
    pub(crate) filters: Filters,
    pub(crate) mask: Option<Mask>,
    pub(crate) node: Arc<str>,
    pub(crate) namespaces: Arc<Namespaces>,
    pub(crate) shared: Arc<Shared>,
}

impl Responses<Ring> for Flows {
    fn wants(&self, item: &Item) -> bool {
        match item {
            Item::Flow(flow) => self.filters.matches(flow),
            // A lost flow could have matched.
            Item::Lost(..) => true,
        }
    }

    fn event(&self, item: Item) -> Encoded {
        let flow = match item {
            Item::Flow(flow) => flow,
            Item::Lost(lost, time) => return convert::lost(lost, &self.node, time),
        };
        let whole = self.shared.get_or_make(&flow.uuid, || {
            self.namespaces.note(&flow);
            convert::response(&flow)
        });
        match &self.mask {
            Some(mask) => convert::masked(&whole, mask),
            None => whole,
        }
    }

    fn lost(&self, count: u64) -> Option<Encoded> {
        let now = Timestamp::from_system_time(SystemTime::now());
        let lost = Lost {
            source: LostSource::HubbleRingBuffer,
            count,
        };
        Some(convert::lost(lost, &self.node, now))
    }
}

/// Responses with events of the daemon, which are encoded already.
pub(crate) struct AgentEvents;

impl Responses<AgentRing> for AgentEvents {
    fn wants(&self, _: &(Timestamp, Encoded)) -> bool {
        true
    }

    fn event(&self, (_, encoded): (Timestamp, Encoded)) -> Encoded {
        encoded
    }

    fn lost(&self, _: u64) -> Option<Encoded> {
        None
    }
}

/// Ring of the debug events of the data path, of which Palisade has none.
#[derive(Debug, Default)]
pub(crate) struct NoEvents;

impl Source for NoEvents {
    type Event = Encoded;

    fn first(&self) -> u64 {
        0
    }

    fn next(&self) -> u64 {
        0
    }

    fn get(&self, _: u64) -> Option<Encoded> {
        None
    }

    fn time(_: &Encoded) -> Timestamp {
        Timestamp::default()
    }
}

impl Responses<NoEvents> for NoEvents {
    fn wants(&self, _: &Encoded) -> bool {
        false
    }

    fn event(&self, event: Encoded) -> Encoded {
        event
    }

    fn lost(&self, _: u64) -> Option<Encoded> {
        None
    }
}
