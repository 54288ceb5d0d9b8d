//! Messages of nf_tables (linux/netfilter/nf_tables.h), made from a few words for what a table holds. Nothing is sent
//! here.

use super::netlink::Request;

/// `NFNL_SUBSYS_NFTABLES` (linux/netfilter/nfnetlink.h).
pub(crate) const SUBSYSTEM: u16 = 10;

const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;
const NEW_OBJECT: u16 = 18;
const GET_OBJECT: u16 = 19;

/// The first attribute of every message names the table.
pub(crate) const TABLE: u16 = 1;
/// `NFTA_TABLE_USERDATA`.
pub(crate) const TABLE_USERDATA: u16 = 6;
/// `NFTA_OBJ_NAME`, `NFTA_OBJ_DATA`.
pub(crate) const OBJECT_NAME: u16 = 2;
pub(crate) const OBJECT_DATA: u16 = 4;
/// `NFTA_COUNTER_BYTES`, `NFTA_COUNTER_PACKETS`.
pub(crate) const COUNTER_BYTES: u16 = 1;
pub(crate) const COUNTER_PACKETS: u16 = 2;

const OBJECT_COUNTER: u32 = 1;
const LIST_ELEMENT: u16 = 1;
/// `NFT_REG_VERDICT`, `NFT_REG_1`: 16 bytes, enough for all that is compared here.
const VERDICT_REGISTER: u32 = 0;
const REGISTER: u32 = 1;

/// Elements of a set in one message: the length of their list has 16 bits.
const ELEMENTS: usize = 256;

/// Address family of a table (linux/netfilter.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// What a bridge takes at its ports.
    Bridge = 7,
}

/// A hook (`enum nf_inet_hooks`; those of bridges have the same numbers).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// What the keys of a set are, with the number by which nft prints them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum KeyType {
    Ipv4 = 7,
    Ipv6 = 8,
    InterfaceIndex = 20,
    InterfaceName = 41,
}

impl KeyType {
    const fn length(self) -> u32 {
        match self {
            Self::Ipv4 | Self::InterfaceIndex => 4,
            Self::Ipv6 | Self::InterfaceName => 16,
        }
    }

    /// `BYTEORDER_HOST_ENDIAN` or `BYTEORDER_BIG_ENDIAN` of nft, which prints keys by it.
    const fn byte_order(self) -> u32 {
        match self {
            Self::InterfaceIndex | Self::InterfaceName => 1,
            Self::Ipv4 | Self::Ipv6 => 2,
        }
    }
}

/// What an expression loads or compares. There is one register.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Expression {
    /// Loads a property of the packet in the kernel.
    Meta(Meta),
    /// Loads bytes of the network header.
    Network { offset: u32, length: u32 },
    /// Loads bytes of the transport header.
    Transport { offset: u32, length: u32 },
    /// Loads a property of the connection that the kernel tracks.
    Connection(Connection),
    /// Loads what the destination is by the kernel's table of local addresses (`RTN_*`).
    DestinationType,
    /// Keeps these bits.
    And(u32),
    /// Goes on if the register compares so.
    Compare(Comparison, Vec<u8>),
    /// Goes on if the set has the register.
    In(&'static str),
    /// Goes on if the set does not have the register.
    NotIn(&'static str),
    /// Counts in an object of the table.
    Count(&'static str),
    /// Ends the chain; the packet goes on.
    Accept,
    /// Ends the packet.
    Drop,
}

/// `enum nft_meta_keys`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Meta {
    Mark = 3,
    InIndex = 4,
    OutIndex = 5,
    InName = 6,
    OutName = 7,
    Family = 15,
    Protocol = 16,
}

/// `enum nft_ct_keys`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Connection {
    /// 0: the packet goes the way of the first one.
    Direction = 1,
    /// `IPS_*` of linux/netfilter/nf_conntrack_common.h.
    Status = 2,
    /// Destination of the first packet, as it came.
    Destination4 = 20,
    Destination6 = 22,
}

/// `enum nft_cmp_ops`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Comparison {
    Equal = 0,
    NotEqual = 1,
    LessOrEqual = 3,
    GreaterOrEqual = 5,
}

impl Family {
    /// As nft writes it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        }
    }

    pub(crate) const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Inet),
            7 => Some(Self::Bridge),
            _ => None,
        }
    }
}

/// Asks for all tables of all families; to be sent as a dump.
pub(crate) fn get_tables() -> Request {
    Request::new(SUBSYSTEM << 8 | GET_TABLE, 0).fixed(&[0; 4])
}

/// A table by its family and name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'a> {
    pub family: Family,
    pub name: &'a str,
}

impl Table<'_> {
    fn message(self, kind: u16, flags: i32) -> Request {
        // struct nfgenmsg: family, version, number of a resource.
        Request::new(SUBSYSTEM << 8 | kind, flags)
            .fixed(&[self.family as u8, 0, 0, 0])
            .attr(TABLE, &text(self.name))
    }

    /// Makes the table if there is none. `note`: what nft shows as its comment.
    pub(crate) fn make(self, note: Option<&str>) -> Request {
        let message = self.message(NEW_TABLE, libc::NLM_F_CREATE);
        match note {
            Some(note) => message.attr(TABLE_USERDATA, &comment(note)),
            None => message,
        }
    }

    /// Deletes the table with everything in it.
    pub(crate) fn delete(self) -> Request {
        self.message(DELETE_TABLE, 0)
    }

    /// Asks for all counters; to be sent as a dump.
    pub(crate) fn get_counters(self) -> Request {
        self.message(GET_OBJECT, 0).attr(3, &word(OBJECT_COUNTER))
    }

    /// A chain at a hook, whose packets pass at its end.
    pub(crate) fn chain(self, name: &str, hook: Hook, priority: i32) -> Request {
        self.message(NEW_CHAIN, libc::NLM_F_CREATE)
            .attr(3, &text(name))
            .nested(4, |at| {
                at.attr(1, &word(hook as u32))
                    .attr(2, &priority.to_be_bytes())
            })
            // NF_ACCEPT.
            .attr(5, &word(1))
            .attr(7, &text("filter"))
    }

    /// A counter that begins with these numbers.
    pub(crate) fn counter(self, name: &str, packets: u64, bytes: u64) -> Request {
        self.message(NEW_OBJECT, libc::NLM_F_CREATE)
            .attr(OBJECT_NAME, &text(name))
            .attr(3, &word(OBJECT_COUNTER))
            .nested(OBJECT_DATA, |data| {
                data.attr(COUNTER_BYTES, &bytes.to_be_bytes())
                    .attr(COUNTER_PACKETS, &packets.to_be_bytes())
            })
    }

    /// A set of single keys.
    pub(crate) fn set(self, name: &str, keys: KeyType, id: u32, elements: &[Vec<u8>]) -> Vec<Request> {
        let count = u32::try_from(elements.len()).unwrap_or(u32::MAX);
        let mut messages = vec![self.new_set(name, keys, id, 0, count)];
        messages.extend(elements.chunks(ELEMENTS).map(|chunk| {
            let chunk: Vec<(&[u8], bool)> = chunk.iter().map(|key| (key.as_slice(), false)).collect();
            self.elements(name, id, &chunk)
        }));
        messages
    }

    /// A set of ranges: the first key of each, and the first one behind it; none: it goes to the end. They must not meet.
    pub(crate) fn ranges(
        self,
        name: &str,
        keys: KeyType,
        id: u32,
        ranges: &[(Vec<u8>, Option<Vec<u8>>)],
    ) -> Vec<Request> {
        /// `NFT_SET_INTERVAL`.
        const INTERVAL: u32 = 4;
        let ends: Vec<(&[u8], bool)> = ranges
            .iter()
            .flat_map(|(first, behind)| {
                let behind = behind.as_ref().map(|behind| (behind.as_slice(), true));
                std::iter::once((first.as_slice(), false)).chain(behind)
            })
            .collect();
        let mut messages = vec![self.new_set(name, keys, id, INTERVAL, 0)];
        messages.extend(ends.chunks(ELEMENTS).map(|chunk| self.elements(name, id, chunk)));
        messages
    }

    /// `size` 0: not said.
    fn new_set(self, name: &str, keys: KeyType, id: u32, flags: u32, size: u32) -> Request {
        // A type, a length and a value for nft: in which byte order it prints the keys.
        let mut userdata = vec![0, 4];
        userdata.extend_from_slice(&keys.byte_order().to_ne_bytes());
        let message = self
            .message(NEW_SET, libc::NLM_F_CREATE)
            .attr(2, &text(name))
            .attr(3, &word(flags))
            .attr(4, &word(keys as u32))
            .attr(5, &word(keys.length()))
            .attr(10, &word(id));
        let message = if size == 0 {
            message
        } else {
            // With a size the kernel takes a table that does not grow, whose look-up is cheaper.
            message.nested(9, |about| about.attr(1, &word(size)))
        };
        message.attr(13, &userdata)
    }

    fn elements(self, set: &str, id: u32, keys: &[(&[u8], bool)]) -> Request {
        /// `NFT_SET_ELEM_INTERVAL_END`.
        const END: u32 = 1;
        self.message(NEW_ELEMENT, libc::NLM_F_CREATE)
            .attr(2, &text(set))
            .attr(4, &word(id))
            .nested(3, |mut list| {
                for (key, is_end) in keys {
                    list = list.nested(LIST_ELEMENT, |element| {
                        let element = element.nested(1, |data| data.attr(1, key));
                        if *is_end {
                            element.attr(3, &word(END))
                        } else {
                            element
                        }
                    });
                }
                list
            })
    }

    /// A rule at the end of a chain. `note`: what nft shows as its comment.
    pub(crate) fn rule(self, chain: &str, expressions: &[Expression], note: &str) -> Request {
        let message = self
            .message(NEW_RULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND)
            .attr(2, &text(chain))
            .nested(4, |mut list| {
                for expression in expressions {
                    list = list.nested(LIST_ELEMENT, |element| encode(element, expression));
                }
                list
            });
        if note.is_empty() {
            message
        } else {
            message.attr(7, &comment(note))
        }
    }
}

fn encode(to: Request, expression: &Expression) -> Request {
    let named =
        |to: Request, name: &str, fill: &dyn Fn(Request) -> Request| to.attr(1, &text(name)).nested(2, fill);
    let payload = |to: Request, base: u32, offset: u32, length: u32| {
        named(to, "payload", &|to| {
            to.attr(1, &word(REGISTER))
                .attr(2, &word(base))
                .attr(3, &word(offset))
                .attr(4, &word(length))
        })
    };
    let lookup = |to: Request, set: &str, flags: u32| {
        named(to, "lookup", &|to| {
            let to = to.attr(1, &text(set)).attr(2, &word(REGISTER));
            if flags == 0 { to } else { to.attr(5, &word(flags)) }
        })
    };
    let verdict = |to: Request, code: u32| {
        named(to, "immediate", &|to| {
            to.attr(1, &word(VERDICT_REGISTER))
                .nested(2, |data| data.nested(2, |verdict| verdict.attr(1, &word(code))))
        })
    };
    match expression {
        Expression::Meta(key) => named(to, "meta", &|to| {
            to.attr(1, &word(REGISTER)).attr(2, &word(*key as u32))
        }),
        Expression::Network { offset, length } => payload(to, 1, *offset, *length),
        Expression::Transport { offset, length } => payload(to, 2, *offset, *length),
        Expression::Connection(key) => named(to, "ct", &|to| {
            let to = to.attr(1, &word(REGISTER)).attr(2, &word(*key as u32));
            match key {
                // IP_CT_DIR_ORIGINAL.
                Connection::Destination4 | Connection::Destination6 => to.attr(3, &[0]),
                Connection::Direction | Connection::Status => to,
            }
        }),
        Expression::DestinationType => named(to, "fib", &|to| {
            // NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR.
            to.attr(1, &word(REGISTER)).attr(2, &word(3)).attr(3, &word(2))
        }),
        Expression::And(bits) => named(to, "bitwise", &|to| {
            to.attr(1, &word(REGISTER))
                .attr(2, &word(REGISTER))
                .attr(3, &word(4))
                .nested(4, |mask| mask.attr(1, &bits.to_ne_bytes()))
                .nested(5, |xor| xor.attr(1, &[0; 4]))
        }),
        Expression::Compare(how, value) => named(to, "cmp", &|to| {
            to.attr(1, &word(REGISTER))
                .attr(2, &word(*how as u32))
                .nested(3, |data| data.attr(1, value))
        }),
        Expression::In(set) => lookup(to, set, 0),
        // NFT_LOOKUP_F_INV.
        Expression::NotIn(set) => lookup(to, set, 1),
        Expression::Count(name) => named(to, "objref", &|to| {
            to.attr(1, &word(OBJECT_COUNTER)).attr(2, &text(name))
        }),
        // NF_ACCEPT, NF_DROP.
        Expression::Accept => verdict(to, 1),
        Expression::Drop => verdict(to, 0),
    }
}

/// What nft takes for a comment of a table or a rule: type 0, length, text.
fn comment(note: &str) -> Vec<u8> {
    let note = text(note);
    let mut bytes = vec![0, u8::try_from(note.len()).unwrap_or(u8::MAX)];
    bytes.extend_from_slice(&note);
    bytes
}

fn text(value: &str) -> Vec<u8> {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// Numbers of nf_tables are big-endian, wherever they are not compared with a register.
const fn word(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}
