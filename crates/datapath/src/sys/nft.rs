//! Messages of nf_tables (linux/netfilter/nf_tables.h) for tables, chains, sets, counters and rules. Hand-written:
//! `netlink-packet-route` does not cover nfnetlink.

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

/// Attribute 1 of every message: the name of the table.
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
/// `NFT_REG_VERDICT`, and `NFT_REG_1`, whose 16 bytes hold the longest compared value.
const VERDICT_REGISTER: u32 = 0;
const REGISTER: u32 = 1;

/// Maximum number of set elements in one message: the length field of the attribute that lists them has 16 bits.
const ELEMENTS: usize = 256;

/// Address family of a table (linux/netfilter.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// Frames of a bridge.
    Bridge = 7,
}

/// Hook (`enum nf_inet_hooks`; the hooks of bridges have the same numbers).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// Key type of a set, with the number that nft uses for it.
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

    /// Returns `BYTEORDER_HOST_ENDIAN` or `BYTEORDER_BIG_ENDIAN` of nft, the byte order in which nft prints keys.
    const fn byte_order(self) -> u32 {
        match self {
            Self::InterfaceIndex | Self::InterfaceName => 1,
            Self::Ipv4 | Self::Ipv6 => 2,
        }
    }
}

/// Expression of a rule. All expressions use one register.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Expression {
    /// Loads packet metadata into the register.
    Meta(Meta),
    /// Loads bytes of the network header into the register.
    Network { offset: u32, length: u32 },
    /// Loads bytes of the transport header into the register.
    Transport { offset: u32, length: u32 },
    /// Loads a property of the nf_conntrack entry into the register.
    Connection(Connection),
    /// Loads the type of the destination address (`RTN_*`) from the routing table into the register.
    DestinationType,
    /// Clears all bits of the register except these.
    And(u32),
    /// Continues if the comparison of the register is true.
    Compare(Comparison, Vec<u8>),
    /// Continues if the set contains the register.
    In(&'static str),
    /// Continues if the set does not contain the register.
    NotIn(&'static str),
    /// Adds the packet to a counter of the table.
    Count(&'static str),
    /// Accepts the packet in this chain.
    Accept,
    /// Drops the packet.
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
    /// Direction of the packet: 0 for the original direction, 1 for the reply.
    Direction = 1,
    /// Status bits (`IPS_*` of linux/netfilter/nf_conntrack_common.h).
    Status = 2,
    /// Destination of the original direction, before NAT.
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
    /// Returns the name of the family in nft syntax.
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

/// Returns a request for all tables of all families, to be sent as a dump.
pub(crate) fn get_tables() -> Request {
    Request::new(SUBSYSTEM << 8 | GET_TABLE, 0).fixed(&[0; 4])
}

/// Table, identified by family and name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'a> {
    pub family: Family,
    pub name: &'a str,
}

impl Table<'_> {
    fn message(self, kind: u16, flags: i32) -> Request {
        // struct nfgenmsg: family, version, resource id.
        Request::new(SUBSYSTEM << 8 | kind, flags)
            .fixed(&[self.family as u8, 0, 0, 0])
            .attr(TABLE, &text(self.name))
    }

    /// Returns a request that creates the table unless it exists. `note` is its comment in nft.
    pub(crate) fn make(self, note: Option<&str>) -> Request {
        let message = self.message(NEW_TABLE, libc::NLM_F_CREATE);
        match note {
            Some(note) => message.attr(TABLE_USERDATA, &comment(note)),
            None => message,
        }
    }

    /// Returns a request that deletes the table with its contents.
    pub(crate) fn delete(self) -> Request {
        self.message(DELETE_TABLE, 0)
    }

    /// Returns a request for all counters of the table, to be sent as a dump.
    pub(crate) fn get_counters(self) -> Request {
        self.message(GET_OBJECT, 0).attr(3, &word(OBJECT_COUNTER))
    }

    /// Returns a request that creates a base chain with the policy accept.
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

    /// Returns a request that creates a counter with initial values.
    pub(crate) fn counter(self, name: &str, packets: u64, bytes: u64) -> Request {
        self.message(NEW_OBJECT, libc::NLM_F_CREATE)
            .attr(OBJECT_NAME, &text(name))
            .attr(3, &word(OBJECT_COUNTER))
            .nested(OBJECT_DATA, |data| {
                data.attr(COUNTER_BYTES, &bytes.to_be_bytes())
                    .attr(COUNTER_PACKETS, &packets.to_be_bytes())
            })
    }

    /// Returns requests that create a set of single keys.
    pub(crate) fn set(self, name: &str, keys: KeyType, id: u32, elements: &[Vec<u8>]) -> Vec<Request> {
        let count = u32::try_from(elements.len()).unwrap_or(u32::MAX);
        let mut messages = vec![self.new_set(name, keys, id, 0, count)];
        messages.extend(elements.chunks(ELEMENTS).map(|chunk| {
            let chunk: Vec<(&[u8], bool)> = chunk.iter().map(|key| (key.as_slice(), false)).collect();
            self.elements(name, id, &chunk)
        }));
        messages
    }

    /// Returns requests that create a set of disjoint ranges. A range is given by its first key and the first key after
    /// it; the latter is `None` if the range contains the largest key.
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

    /// Returns a request that creates a set of at most `size` elements; 0: no limit.
    fn new_set(self, name: &str, keys: KeyType, id: u32, flags: u32, size: u32) -> Request {
        // User data for nft (type, length, value): the byte order in which nft prints the keys.
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
            // With a size limit the kernel uses a hash table of fixed size, whose lookup is cheaper.
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

    /// Returns a request that appends a rule to a chain. `note` is its comment in nft.
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

/// Returns a comment of a table or rule as nft encodes it: type 0, length, text.
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

/// Returns a number in network byte order, which nf_tables uses for all numbers except data that is compared or
/// combined with a register.
const fn word(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}
