//! What a planned restart hands over of a TLS connection: during the handshake whether a hello was forwarded, after it the
//! hello, which a change of the rules evaluates again.

use palisade_protocols::{
    dns::Name,
    tls::{ClientHello, ClientReader, ServerName, ServerReader},
};

use super::{Evaluated, Flow};
use crate::{
    handover::wire::{Reader, Wire, read_bytes, write_bytes},
    tcp::Transferable,
};

/// Number of each [`ServerName`].
mod kind {
    pub(super) const MISSING: u8 = 0;
    pub(super) const NAME: u8 = 1;
    pub(super) const ADDRESS: u8 = 2;
}

impl Wire for Evaluated {
    fn write(&self, out: &mut Vec<u8>) {
        self.ruleset.write(out);
        self.audit.write(out);
        self.known.write(out);
        let hello = &self.hello;
        hello.version.write(out);
        hello.ech.write(out);
        hello.early_data.write(out);
        match &hello.server_name {
            ServerName::Missing => kind::MISSING.write(out),
            ServerName::Name(name) => {
                kind::NAME.write(out);
                write_bytes(name.wire(), out);
            }
            ServerName::Address(address) => {
                kind::ADDRESS.write(out);
                write_bytes(address.to_string().as_bytes(), out);
            }
        }
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            ruleset: Wire::read(from)?,
            audit: Wire::read(from)?,
            known: Wire::read(from)?,
            hello: Box::new(ClientHello {
                version: Wire::read(from)?,
                ech: Wire::read(from)?,
                early_data: Wire::read(from)?,
                server_name: match u8::read(from)? {
                    kind::MISSING => ServerName::Missing,
                    kind::NAME => ServerName::Name(Name::from_wire(read_bytes(from)?).ok()?),
                    kind::ADDRESS => {
                        let text = std::str::from_utf8(read_bytes(from)?).ok()?;
                        ServerName::Address(text.parse().ok()?)
                    }
                    _ => return None,
                },
            }),
        })
    }
}

impl Transferable for Flow {
    fn write(&self, out: &mut Vec<u8>) -> bool {
        self.begun.write(out);
        self.about.write(out);
        self.evaluated.write(out);
        // The bytes of an incomplete first hello are read again from its beginning. Behind a hello the readers have read
        // bytes that were forwarded, so they must be between two records.
        !self.begun || self.fed == 0 && self.client.is_between_records() && self.server.is_between_records()
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let begun = bool::read(from)?;
        Some(Self {
            client: if begun {
                ClientReader::behind_hello()
            } else {
                ClientReader::default()
            },
            server: ServerReader::default(),
            fed: 0,
            begun,
            about: Wire::read(from)?,
            evaluated: Wire::read(from)?,
        })
    }
}
