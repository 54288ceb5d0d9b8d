//! Field masks: which fields of a flow a client wants. A mask is applied to the encoded flow, so that a flow is encoded
//! only once for all readers.

use bytes::{BufMut as _, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::{
    echo,
    schema::{Message, parts},
};

/// Wanted fields of one message, with the wanted fields below each; `None` for the whole field.
#[derive(Debug, Default)]
pub(crate) struct Mask(Vec<(u32, Option<Mask>)>);

impl Mask {
    /// Returns the mask of paths of the message `flow.Flow`; `None` if there are no paths.
    ///
    /// # Errors
    /// Fails with a text that names the path if the path is not one of the message.
    pub(crate) fn new(paths: &[String]) -> Result<Option<Self>, String> {
        let flow = Message::of("flow.Flow").ok_or("no definition of flow.Flow")?;
        let mut mask = Self::default();
        for path in paths {
            mask.add(flow, path, path)?;
        }
        Ok((!paths.is_empty()).then_some(mask))
    }

    fn add(&mut self, message: &'static Message, rest: &str, path: &str) -> Result<(), String> {
        let (name, below) = match rest.split_once('.') {
            Some((name, below)) => (name, Some(below)),
            None => (rest, None),
        };
        let field = message.field_by_name(name).ok_or_else(|| {
            let (path, name) = (echo(path), echo(name));
            format!("field mask: '{path}': {} has no field '{name}'", message.name)
        })?;
        let at = self.0.iter().position(|(number, _)| *number == field.number);
        let Some(below) = below else {
            match at {
                Some(at) => self.0[at].1 = None,
                None => self.0.push((field.number, None)),
            }
            return Ok(());
        };
        let inner = field.inner().filter(|_| !field.repeated).ok_or_else(|| {
            let path = echo(path);
            format!("field mask: '{path}': '{name}' of {} has no fields", message.name)
        })?;
        let at = at.unwrap_or_else(|| {
            self.0.push((field.number, Some(Self::default())));
            self.0.len() - 1
        });
        match &mut self.0[at].1 {
            Some(mask) => mask.add(inner, below, path),
            // The whole field is wanted already; the path must be valid all the same.
            None => Self::default().add(inner, below, path),
        }
    }

    /// Appends the wanted fields of an encoded message.
    pub(crate) fn apply(&self, message: &[u8], to: &mut BytesMut) {
        // The message was encoded by this server, so no part is broken.
        for part in parts(message).map_while(Result::ok) {
            let Some((_, below)) = self.0.iter().find(|(number, _)| *number == part.number) else {
                continue;
            };
            match (below, part.content) {
                (Some(below), Some(content)) => {
                    let mut inner = BytesMut::with_capacity(content.len());
                    below.apply(content, &mut inner);
                    encode_key(part.number, WireType::LengthDelimited, to);
                    encode_varint(inner.len() as u64, to);
                    to.put_slice(&inner);
                }
                _ => to.put_slice(part.whole),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::proto::flow::{Endpoint, Flow, Ip, Policy};

    fn masked(paths: &[&str], flow: &Flow) -> Flow {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        let mask = Mask::new(&paths).unwrap().unwrap();
        let mut bytes = BytesMut::new();
        mask.apply(&flow.encode_to_vec(), &mut bytes);
        Flow::decode(bytes).unwrap()
    }

    fn flow() -> Flow {
        Flow {
            node_name: "n".into(),
            verdict: 2,
            summary: "s".into(),
            ip: Some(Ip {
                source: "10.0.0.1".into(),
                destination: "10.0.0.2".into(),
                ..Ip::default()
            }),
            source: Some(Endpoint {
                id: 7,
                identity: 300,
                labels: vec!["k8s:a=b".into()],
                ..Endpoint::default()
            }),
            egress_denied_by: vec![Policy::default(), Policy::default()],
            ..Flow::default()
        }
    }

    #[test]
    fn only_wanted_fields_stay() {
        let said = masked(
            &["verdict", "source.ID", "IP.source", "egress_denied_by"],
            &flow(),
        );
        let wanted = Flow {
            verdict: 2,
            ip: Some(Ip {
                source: "10.0.0.1".into(),
                ..Ip::default()
            }),
            source: Some(Endpoint {
                id: 7,
                ..Endpoint::default()
            }),
            egress_denied_by: vec![Policy::default(), Policy::default()],
            ..Flow::default()
        };
        assert_eq!(said, wanted);
        // A path to the whole field includes the paths below it, in any order.
        for paths in [["source", "source.ID"], ["source.ID", "source"]] {
            assert_eq!(masked(&paths, &flow()).source, flow().source);
        }
        // Fields that Palisade never fills are valid.
        assert_eq!(
            masked(&["tunnel.IP.source", "aggregate"], &flow()),
            Flow::default()
        );
    }

    #[test]
    fn paths_that_the_flow_does_not_have_are_refused_by_name() {
        for (path, named) in [
            ("verdikt", "verdikt"),
            ("source.colour", "colour"),
            ("verdict.x", "verdict"),
            ("egress_denied_by.name", "egress_denied_by"),
            ("", "''"),
            ("source.", "''"),
        ] {
            let error = Mask::new(&[path.to_owned()]).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        assert!(Mask::new(&["source".to_owned(), "source.x".to_owned()]).is_err());
        assert!(Mask::new(&[]).unwrap().is_none());
    }
}
