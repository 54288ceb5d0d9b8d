//! What a planned restart hands over of a Kafka connection.

use super::{Flow, Left, Pending};
use crate::{
    handover::wire::{Reader, Wire, wire},
    tcp::Transferable,
};

wire!(Left { ruleset, audit });

wire!(Pending {
    key,
    version,
    correlation,
    topic,
    since,
    session
});

impl Transferable for Flow {
    fn write(&self, out: &mut Vec<u8>) -> bool {
        self.pending.write(out);
        self.session.write(out);
        self.rest.write(out);
        self.ended.write(out);
        self.left.write(out);
        self.about.write(out);
        // A refused request is answered by the process that has refused it.
        self.refused.is_none()
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            pending: Wire::read(from)?,
            session: Wire::read(from)?,
            refused: None,
            rest: Wire::read(from)?,
            ended: Wire::read(from)?,
            left: Wire::read(from)?,
            about: Wire::read(from)?,
        })
    }
}
