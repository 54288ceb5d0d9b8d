//! Tables of the messages: which fields a request has in which version, and which its response has.

use super::numbers::API_VERSIONS;

/// Whether requests of an API key name topics.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Topics {
    /// No request of this key names a topic.
    None,
    /// No request of this key names a topic, and requests administer the cluster. A rule for a topic without API keys
    /// does not mean them.
    Admin,
    /// Requests name topics, which the walker reports.
    Read,
    /// Requests may name topics in fields that the tables do not have. They pass only by rules for all topics.
    Unread,
}

/// Kind of a field of a request.
#[derive(Clone, Copy)]
pub(super) enum Req {
    /// Bytes to skip.
    Skip(usize),
    /// The `acks` of Produce.
    Acks,
    /// Session id of Fetch.
    SessionId,
    /// Session epoch of Fetch.
    SessionEpoch,
    /// A text.
    Text,
    /// A text or null.
    NullText,
    /// Bytes or records, or null.
    Bytes,
    /// The name of a topic, or null.
    Topic,
    /// The id of a topic; zero for none.
    TopicId,
    /// Array of topic names, or null.
    TopicNames,
    /// A pattern of topic names, or null.
    TopicPattern,
    /// A partition number.
    Partition,
    /// Array of partition numbers.
    Partitions,
    /// A group id, or another key that the response repeats.
    Group,
    /// Array of group ids or other keys that the response repeats.
    Groups,
    /// Array of structures.
    List(&'static [Field<Req>]),
    /// Array of structures, or null.
    NullList(&'static [Field<Req>]),
    /// Array of structures; empty or null for all topics.
    AllIfEmpty(&'static [Field<Req>]),
    /// Array of structures, or null for all topics.
    AllList(&'static [Field<Req>]),
    /// A structure, or null: a byte that is negative for null.
    NullStruct(&'static [Field<Req>]),
}

/// Kind of a field of a response that denies a request.
#[derive(Clone, Copy)]
pub(super) enum Resp {
    /// Zero bytes.
    Zeros(usize),
    /// Bytes of value 255: -1 as a number.
    Ones(usize),
    /// Authorized operations that were not asked for: the lowest `i32`.
    NoOperations,
    /// The error code of the request as a whole: 0 if the response has topics, which then have the error.
    Error,
    /// The error code of a topic, partition or group.
    ItemError,
    /// The session id of Fetch: 0, no session.
    SessionId,
    /// An empty text.
    Text,
    /// Null.
    NullText,
    /// Empty bytes.
    Bytes,
    /// An empty array.
    Empty,
    /// A null array.
    NullArray,
    /// A null structure.
    NullStruct,
    /// The broker through which the request came.
    Broker(&'static [Field<Resp>]),
    /// One structure for each topic of the request.
    Topics(&'static [Field<Resp>]),
    /// One structure for each partition of the topic.
    Partitions(&'static [Field<Resp>]),
    /// One structure for each group of the request.
    Groups(&'static [Field<Resp>]),
    /// Name of the topic, or null if the request has only its id.
    Name,
    /// Name of the topic, or an empty text if the request has only its id.
    NameOrEmpty,
    /// Id of the topic.
    Id,
    /// Number of the partition.
    Index,
    /// Id of the group.
    Group,
    /// Number of the broker.
    BrokerId,
    /// Address of the broker.
    BrokerHost,
    /// Port of the broker.
    BrokerPort,
}

/// A field, and the versions that have it.
#[derive(Clone, Copy)]
pub(super) struct Field<K: 'static> {
    pub(super) kind: K,
    first: i16,
    last: i16,
}

impl<K> Field<K> {
    pub(super) const fn is_in(&self, version: i16) -> bool {
        self.first <= version && version <= self.last
    }
}

/// A field of all versions from `first`.
const fn f<K: Copy>(kind: K, first: i16) -> Field<K> {
    upto(kind, first, i16::MAX)
}

/// A field of the versions `first` to `last`.
const fn upto<K: Copy>(kind: K, first: i16, last: i16) -> Field<K> {
    Field { kind, first, last }
}

/// Messages of one API key.
pub(super) struct Api {
    key: i16,
    name: &'static str,
    /// Last version that the table has.
    last: i16,
    /// First version with compact lengths and tagged fields.
    flexible: i16,
    topics: Topics,
    /// Fields of the request; empty if only its header is read.
    pub(super) request: &'static [Field<Req>],
    /// Fields of the response; empty if there is no response that denies, so that the connection is reset.
    pub(super) response: &'static [Field<Resp>],
}

const fn api(
    key: i16,
    name: &'static str,
    last: i16,
    flexible: i16,
    topics: Topics,
    request: &'static [Field<Req>],
    response: &'static [Field<Resp>],
) -> Api {
    Api {
        key,
        name,
        last,
        flexible,
        topics,
        request,
        response,
    }
}

/// An API key that topic rules never allow, and whose denial resets the connection.
const fn unread(key: i16, name: &'static str) -> Api {
    api(key, name, -1, i16::MAX, Topics::Unread, &[], &[])
}

/// An API key whose requests name no topic. `flexible`: first flexible version.
const fn plain(
    key: i16,
    name: &'static str,
    last: i16,
    flexible: i16,
    response: &'static [Field<Resp>],
) -> Api {
    api(key, name, last, flexible, Topics::None, &[], response)
}

/// An API key whose requests administer the cluster and name no topic. `flexible`: first flexible version.
const fn admin(
    key: i16,
    name: &'static str,
    last: i16,
    flexible: i16,
    response: &'static [Field<Resp>],
) -> Api {
    api(key, name, last, flexible, Topics::Admin, &[], response)
}

const NEVER: i16 = i16::MAX;
const THROTTLE: Resp = Resp::Zeros(4);
const ERROR_ONLY: &[Field<Resp>] = &[f(THROTTLE, 0), f(Resp::Error, 0)];
const THROTTLE1_ERROR: &[Field<Resp>] = &[f(THROTTLE, 1), f(Resp::Error, 0)];
/// Partitions with an error code and nothing else.
const PARTITION_ERRORS: &[Field<Resp>] = &[f(Resp::Index, 0), f(Resp::ItemError, 0)];
const NAME_AND_ERRORS: &[Field<Resp>] = &[f(Resp::Name, 0), f(Resp::Partitions(PARTITION_ERRORS), 0)];
const NAME_AND_PARTITIONS: &[Field<Req>] = &[f(Req::Topic, 0), f(Req::Partitions, 0)];

use Topics::{Read, Unread};

/// All API keys of Apache Kafka 4.1, in their order.
static APIS: [Api; 93] = [
    api(
        0,
        "produce",
        13,
        9,
        Read,
        &[
            f(Req::NullText, 3),
            f(Req::Acks, 0),
            f(Req::Skip(4), 0),
            f(
                Req::List(&[
                    upto(Req::Topic, 0, 12),
                    f(Req::TopicId, 13),
                    f(Req::List(&[f(Req::Partition, 0), f(Req::Bytes, 0)]), 0),
                ]),
                0,
            ),
        ],
        &[
            f(
                Resp::Topics(&[
                    upto(Resp::Name, 0, 12),
                    f(Resp::Id, 13),
                    f(
                        Resp::Partitions(&[
                            f(Resp::Index, 0),
                            f(Resp::ItemError, 0),
                            f(Resp::Ones(8), 0),
                            f(Resp::Ones(8), 2),
                            f(Resp::Ones(8), 5),
                            f(Resp::Empty, 8),
                            f(Resp::NullText, 8),
                        ]),
                        0,
                    ),
                ]),
                0,
            ),
            f(THROTTLE, 1),
        ],
    ),
    api(
        1,
        "fetch",
        18,
        12,
        Read,
        &[
            upto(Req::Skip(4), 0, 14),
            f(Req::Skip(8), 0),
            f(Req::Skip(4), 3),
            f(Req::Skip(1), 4),
            f(Req::SessionId, 7),
            f(Req::SessionEpoch, 7),
            f(
                Req::List(&[
                    upto(Req::Topic, 0, 12),
                    f(Req::TopicId, 13),
                    f(
                        Req::List(&[
                            f(Req::Partition, 0),
                            f(Req::Skip(4), 9),
                            f(Req::Skip(8), 0),
                            f(Req::Skip(4), 12),
                            f(Req::Skip(8), 5),
                            f(Req::Skip(4), 0),
                        ]),
                        0,
                    ),
                ]),
                0,
            ),
            f(
                Req::List(&[
                    upto(Req::Topic, 7, 12),
                    f(Req::TopicId, 13),
                    f(Req::Partitions, 7),
                ]),
                7,
            ),
            f(Req::Text, 11),
        ],
        &[
            f(THROTTLE, 1),
            f(Resp::Error, 7),
            f(Resp::SessionId, 7),
            f(
                Resp::Topics(&[
                    upto(Resp::Name, 0, 12),
                    f(Resp::Id, 13),
                    f(
                        Resp::Partitions(&[
                            f(Resp::Index, 0),
                            f(Resp::ItemError, 0),
                            f(Resp::Ones(8), 0),
                            f(Resp::Ones(8), 4),
                            f(Resp::Ones(8), 5),
                            f(Resp::NullArray, 4),
                            f(Resp::Ones(4), 11),
                            f(Resp::Bytes, 0),
                        ]),
                        0,
                    ),
                ]),
                0,
            ),
        ],
    ),
    api(
        2,
        "offsets",
        11,
        6,
        Read,
        &[
            f(Req::Skip(4), 0),
            f(Req::Skip(1), 2),
            f(
                Req::List(&[
                    f(Req::Topic, 0),
                    f(
                        Req::List(&[
                            f(Req::Partition, 0),
                            f(Req::Skip(4), 4),
                            f(Req::Skip(8), 0),
                            upto(Req::Skip(4), 0, 0),
                        ]),
                        0,
                    ),
                ]),
                0,
            ),
            f(Req::Skip(4), 10),
        ],
        &[
            f(THROTTLE, 2),
            f(
                Resp::Topics(&[
                    f(Resp::Name, 0),
                    f(
                        Resp::Partitions(&[
                            f(Resp::Index, 0),
                            f(Resp::ItemError, 0),
                            upto(Resp::Empty, 0, 0),
                            f(Resp::Ones(8), 1),
                            f(Resp::Ones(8), 1),
                            f(Resp::Ones(4), 4),
                        ]),
                        0,
                    ),
                ]),
                0,
            ),
        ],
    ),
    api(
        3,
        "metadata",
        13,
        9,
        Read,
        &[
            f(Req::AllList(&[f(Req::TopicId, 10), f(Req::Topic, 0)]), 0),
            f(Req::Skip(1), 4),
            upto(Req::Skip(1), 8, 10),
            f(Req::Skip(1), 8),
        ],
        &[
            f(THROTTLE, 3),
            f(
                Resp::Broker(&[
                    f(Resp::BrokerId, 0),
                    f(Resp::BrokerHost, 0),
                    f(Resp::BrokerPort, 0),
                    f(Resp::NullText, 1),
                ]),
                0,
            ),
            f(Resp::NullText, 2),
            f(Resp::Ones(4), 1),
            f(
                Resp::Topics(&[
                    f(Resp::ItemError, 0),
                    upto(Resp::NameOrEmpty, 0, 11),
                    f(Resp::Name, 12),
                    f(Resp::Id, 10),
                    f(Resp::Zeros(1), 1),
                    f(Resp::Empty, 0),
                    f(Resp::NoOperations, 8),
                ]),
                0,
            ),
            upto(Resp::NoOperations, 8, 10),
            f(Resp::Error, 13),
        ],
    ),
    unread(4, "leaderandisr"),
    unread(5, "stopreplica"),
    unread(6, "updatemetadata"),
    admin(
        7,
        "controlledshutdown",
        3,
        3,
        &[f(Resp::Error, 0), f(Resp::Empty, 0)],
    ),
    api(
        8,
        "offsetcommit",
        10,
        8,
        Read,
        &[
            f(Req::Text, 0),
            f(Req::Skip(4), 1),
            f(Req::Text, 1),
            f(Req::NullText, 7),
            upto(Req::Skip(8), 2, 4),
            f(
                Req::List(&[
                    upto(Req::Topic, 0, 9),
                    f(Req::TopicId, 10),
                    f(
                        Req::List(&[
                            f(Req::Partition, 0),
                            f(Req::Skip(8), 0),
                            f(Req::Skip(4), 6),
                            upto(Req::Skip(8), 1, 1),
                            f(Req::NullText, 0),
                        ]),
                        0,
                    ),
                ]),
                0,
            ),
        ],
        &[
            f(THROTTLE, 3),
            f(
                Resp::Topics(&[
                    upto(Resp::Name, 0, 9),
                    f(Resp::Id, 10),
                    f(Resp::Partitions(PARTITION_ERRORS), 0),
                ]),
                0,
            ),
        ],
    ),
    api(
        9,
        "offsetfetch",
        10,
        6,
        Read,
        &[
            upto(Req::Text, 0, 7),
            upto(Req::AllList(NAME_AND_PARTITIONS), 0, 7),
            f(
                Req::List(&[
                    f(Req::Group, 8),
                    f(Req::NullText, 9),
                    f(Req::Skip(4), 9),
                    f(
                        Req::AllList(&[upto(Req::Topic, 8, 9), f(Req::TopicId, 10), f(Req::Partitions, 8)]),
                        8,
                    ),
                ]),
                8,
            ),
            f(Req::Skip(1), 7),
        ],
        &[
            f(THROTTLE, 3),
            upto(
                Resp::Topics(&[f(Resp::Name, 0), f(Resp::Partitions(OFFSET_FETCH_PARTITION), 0)]),
                0,
                7,
            ),
            upto(Resp::Error, 2, 7),
            f(
                Resp::Groups(&[
                    f(Resp::Group, 8),
                    f(
                        Resp::Topics(&[
                            upto(Resp::Name, 8, 9),
                            f(Resp::Id, 10),
                            f(Resp::Partitions(OFFSET_FETCH_PARTITION), 8),
                        ]),
                        8,
                    ),
                    f(Resp::Error, 8),
                ]),
                8,
            ),
        ],
    ),
    api(
        10,
        "findcoordinator",
        6,
        3,
        Topics::None,
        &[upto(Req::Text, 0, 3), f(Req::Skip(1), 1), f(Req::Groups, 4)],
        &[
            f(THROTTLE, 1),
            upto(Resp::Error, 0, 3),
            upto(Resp::NullText, 1, 3),
            upto(Resp::Ones(4), 0, 3),
            upto(Resp::Text, 0, 3),
            upto(Resp::Ones(4), 0, 3),
            f(
                Resp::Groups(&[
                    f(Resp::Group, 4),
                    f(Resp::Ones(4), 4),
                    f(Resp::Text, 4),
                    f(Resp::Ones(4), 4),
                    f(Resp::ItemError, 4),
                    f(Resp::NullText, 4),
                ]),
                4,
            ),
        ],
    ),
    plain(
        11,
        "joingroup",
        9,
        6,
        &[
            f(THROTTLE, 2),
            f(Resp::Error, 0),
            f(Resp::Ones(4), 0),
            f(Resp::NullText, 7),
            upto(Resp::Text, 0, 6),
            f(Resp::NullText, 7),
            f(Resp::Text, 0),
            f(Resp::Zeros(1), 9),
            f(Resp::Text, 0),
            f(Resp::Empty, 0),
        ],
    ),
    plain(12, "heartbeat", 4, 4, THROTTLE1_ERROR),
    plain(
        13,
        "leavegroup",
        5,
        4,
        &[f(THROTTLE, 1), f(Resp::Error, 0), f(Resp::Empty, 3)],
    ),
    plain(
        14,
        "syncgroup",
        5,
        4,
        &[
            f(THROTTLE, 1),
            f(Resp::Error, 0),
            f(Resp::NullText, 5),
            f(Resp::NullText, 5),
            f(Resp::Bytes, 0),
        ],
    ),
    api(
        15,
        "describegroups",
        6,
        5,
        Topics::None,
        &[f(Req::Groups, 0), f(Req::Skip(1), 3)],
        &[
            f(THROTTLE, 1),
            f(
                Resp::Groups(&[
                    f(Resp::ItemError, 0),
                    f(Resp::NullText, 6),
                    f(Resp::Group, 0),
                    f(Resp::Text, 0),
                    f(Resp::Text, 0),
                    f(Resp::Text, 0),
                    f(Resp::Empty, 0),
                    f(Resp::NoOperations, 3),
                ]),
                0,
            ),
        ],
    ),
    plain(
        16,
        "listgroups",
        5,
        3,
        &[f(THROTTLE, 1), f(Resp::Error, 0), f(Resp::Empty, 0)],
    ),
    plain(
        17,
        "saslhandshake",
        1,
        NEVER,
        &[f(Resp::Error, 0), f(Resp::Empty, 0)],
    ),
    plain(
        18,
        "apiversions",
        4,
        3,
        &[f(Resp::Error, 0), f(Resp::Empty, 0), f(THROTTLE, 1)],
    ),
    api(
        19,
        "createtopics",
        7,
        5,
        Read,
        &[
            f(
                Req::List(&[
                    f(Req::Topic, 0),
                    f(Req::Skip(6), 0),
                    f(Req::List(&[f(Req::Skip(4), 0), f(Req::Partitions, 0)]), 0),
                    f(Req::List(&[f(Req::Text, 0), f(Req::NullText, 0)]), 0),
                ]),
                0,
            ),
            f(Req::Skip(4), 0),
            f(Req::Skip(1), 1),
        ],
        &[
            f(THROTTLE, 2),
            f(
                Resp::Topics(&[
                    f(Resp::Name, 0),
                    f(Resp::Zeros(16), 7),
                    f(Resp::ItemError, 0),
                    f(Resp::NullText, 1),
                    f(Resp::Ones(4), 5),
                    f(Resp::Ones(2), 5),
                    f(Resp::NullArray, 5),
                ]),
                0,
            ),
        ],
    ),
    api(
        20,
        "deletetopics",
        6,
        4,
        Read,
        &[
            upto(Req::TopicNames, 0, 5),
            f(Req::List(&[f(Req::Topic, 6), f(Req::TopicId, 6)]), 6),
            f(Req::Skip(4), 0),
        ],
        &[
            f(THROTTLE, 1),
            f(
                Resp::Topics(&[
                    f(Resp::Name, 0),
                    f(Resp::Id, 6),
                    f(Resp::ItemError, 0),
                    f(Resp::NullText, 5),
                ]),
                0,
            ),
        ],
    ),
    api(
        21,
        "deleterecords",
        2,
        2,
        Read,
        &[
            f(
                Req::List(&[
                    f(Req::Topic, 0),
                    f(Req::List(&[f(Req::Partition, 0), f(Req::Skip(8), 0)]), 0),
                ]),
                0,
            ),
            f(Req::Skip(4), 0),
        ],
        &[
            f(THROTTLE, 0),
            f(
                Resp::Topics(&[
                    f(Resp::Name, 0),
                    f(
                        Resp::Partitions(&[f(Resp::Index, 0), f(Resp::Ones(8), 0), f(Resp::ItemError, 0)]),
                        0,
                    ),
                ]),
                0,
            ),
        ],
    ),
    plain(
        22,
        "initproducerid",
        6,
        2,
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 0),
            f(Resp::Ones(10), 0),
            f(Resp::Ones(10), 6),
        ],
    ),
    api(
        23,
        "offsetforleaderepoch",
        4,
        4,
        Read,
        &[
            f(Req::Skip(4), 3),
            f(
                Req::List(&[
                    f(Req::Topic, 0),
                    f(
                        Req::List(&[f(Req::Partition, 0), f(Req::Skip(4), 2), f(Req::Skip(4), 0)]),
                        0,
                    ),
                ]),
                0,
            ),
        ],
        &[
            f(THROTTLE, 2),
            f(
                Resp::Topics(&[
                    f(Resp::Name, 0),
                    f(
                        Resp::Partitions(&[
                            f(Resp::ItemError, 0),
                            f(Resp::Index, 0),
                            f(Resp::Ones(4), 1),
                            f(Resp::Ones(8), 0),
                        ]),
                        0,
                    ),
                ]),
                0,
            ),
        ],
    ),
    api(
        24,
        "addpartitionstotxn",
        5,
        3,
        Read,
        &[
            upto(Req::Text, 0, 3),
            upto(Req::Skip(10), 0, 3),
            upto(Req::List(NAME_AND_PARTITIONS), 0, 3),
            f(
                Req::List(&[
                    f(Req::Group, 4),
                    f(Req::Skip(11), 4),
                    f(Req::List(NAME_AND_PARTITIONS), 4),
                ]),
                4,
            ),
        ],
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 4),
            upto(Resp::Topics(NAME_AND_ERRORS), 0, 3),
            f(
                Resp::Groups(&[f(Resp::Group, 4), f(Resp::Topics(NAME_AND_ERRORS), 4)]),
                4,
            ),
        ],
    ),
    plain(25, "addoffsetstotxn", 4, 3, ERROR_ONLY),
    plain(
        26,
        "endtxn",
        5,
        3,
        &[f(THROTTLE, 0), f(Resp::Error, 0), f(Resp::Ones(10), 5)],
    ),
    unread(27, "writetxnmarkers"),
    api(
        28,
        "txnoffsetcommit",
        5,
        3,
        Read,
        &[
            f(Req::Text, 0),
            f(Req::Text, 0),
            f(Req::Skip(10), 0),
            f(Req::Skip(4), 3),
            f(Req::Text, 3),
            f(Req::NullText, 3),
            f(
                Req::List(&[
                    f(Req::Topic, 0),
                    f(
                        Req::List(&[
                            f(Req::Partition, 0),
                            f(Req::Skip(8), 0),
                            f(Req::Skip(4), 2),
                            f(Req::NullText, 0),
                        ]),
                        0,
                    ),
                ]),
                0,
            ),
        ],
        &[f(THROTTLE, 0), f(Resp::Topics(NAME_AND_ERRORS), 0)],
    ),
    // The resources of these requests may be topics.
    api(
        29,
        "describeacls",
        3,
        2,
        Unread,
        &[],
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 0),
            f(Resp::NullText, 0),
            f(Resp::Empty, 0),
        ],
    ),
    unread(30, "createacls"),
    unread(31, "deleteacls"),
    unread(32, "describeconfigs"),
    unread(33, "alterconfigs"),
    unread(34, "alterreplicalogdirs"),
    api(
        35,
        "describelogdirs",
        5,
        2,
        Read,
        &[f(Req::AllList(NAME_AND_PARTITIONS), 0)],
        &[f(THROTTLE, 0), f(Resp::Error, 3), f(Resp::Empty, 0)],
    ),
    plain(
        36,
        "saslauthenticate",
        2,
        2,
        &[
            f(Resp::Error, 0),
            f(Resp::NullText, 0),
            f(Resp::Bytes, 0),
            f(Resp::Zeros(8), 1),
        ],
    ),
    api(
        37,
        "createpartitions",
        3,
        2,
        Read,
        &[
            f(
                Req::List(&[
                    f(Req::Topic, 0),
                    f(Req::Skip(4), 0),
                    f(Req::NullList(&[f(Req::Partitions, 0)]), 0),
                ]),
                0,
            ),
            f(Req::Skip(5), 0),
        ],
        &[
            f(THROTTLE, 0),
            f(
                Resp::Topics(&[f(Resp::Name, 0), f(Resp::ItemError, 0), f(Resp::NullText, 0)]),
                0,
            ),
        ],
    ),
    admin(38, "createdelegationtoken", 3, 2, &[]),
    admin(
        39,
        "renewdelegationtoken",
        2,
        2,
        &[f(Resp::Error, 0), f(Resp::Zeros(12), 0)],
    ),
    admin(
        40,
        "expiredelegationtoken",
        2,
        2,
        &[f(Resp::Error, 0), f(Resp::Zeros(12), 0)],
    ),
    admin(
        41,
        "describedelegationtoken",
        3,
        2,
        &[f(Resp::Error, 0), f(Resp::Empty, 0), f(THROTTLE, 0)],
    ),
    api(
        42,
        "deletegroups",
        2,
        2,
        Topics::Admin,
        &[f(Req::Groups, 0)],
        &[
            f(THROTTLE, 0),
            f(Resp::Groups(&[f(Resp::Group, 0), f(Resp::ItemError, 0)]), 0),
        ],
    ),
    unread(43, "electleaders"),
    unread(44, "incrementalalterconfigs"),
    unread(45, "alterpartitionreassignments"),
    unread(46, "listpartitionreassignments"),
    api(
        47,
        "offsetdelete",
        0,
        NEVER,
        Read,
        &[
            f(Req::Text, 0),
            f(
                Req::List(&[f(Req::Topic, 0), f(Req::List(&[f(Req::Partition, 0)]), 0)]),
                0,
            ),
        ],
        &[
            f(Resp::Error, 0),
            f(THROTTLE, 0),
            f(Resp::Topics(NAME_AND_ERRORS), 0),
        ],
    ),
    admin(
        48,
        "describeclientquotas",
        1,
        1,
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 0),
            f(Resp::NullText, 0),
            f(Resp::NullArray, 0),
        ],
    ),
    admin(49, "alterclientquotas", 1, 1, &[]),
    admin(
        50,
        "describeuserscramcredentials",
        0,
        0,
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 0),
            f(Resp::NullText, 0),
            f(Resp::Empty, 0),
        ],
    ),
    admin(51, "alteruserscramcredentials", 0, 0, &[]),
    unread(52, "vote"),
    unread(53, "beginquorumepoch"),
    unread(54, "endquorumepoch"),
    unread(55, "describequorum"),
    unread(56, "alterpartition"),
    admin(57, "updatefeatures", 2, 0, &[]),
    // The request contains another request.
    unread(58, "envelope"),
    unread(59, "fetchsnapshot"),
    plain(
        60,
        "describecluster",
        2,
        0,
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 0),
            f(Resp::NullText, 0),
            f(Resp::Zeros(1), 1),
            f(Resp::Text, 0),
            f(Resp::Ones(4), 0),
            f(Resp::Empty, 0),
            f(Resp::NoOperations, 0),
        ],
    ),
    unread(61, "describeproducers"),
    unread(62, "brokerregistration"),
    unread(63, "brokerheartbeat"),
    admin(
        64,
        "unregisterbroker",
        0,
        0,
        &[f(THROTTLE, 0), f(Resp::Error, 0), f(Resp::NullText, 0)],
    ),
    plain(65, "describetransactions", 0, 0, &[]),
    plain(
        66,
        "listtransactions",
        2,
        0,
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 0),
            f(Resp::Empty, 0),
            f(Resp::Empty, 0),
        ],
    ),
    admin(
        67,
        "allocateproducerids",
        0,
        0,
        &[f(THROTTLE, 0), f(Resp::Error, 0), f(Resp::Zeros(12), 0)],
    ),
    api(
        68,
        "consumergroupheartbeat",
        1,
        0,
        Read,
        &[
            f(Req::Text, 0),
            f(Req::Text, 0),
            f(Req::Skip(4), 0),
            f(Req::NullText, 0),
            f(Req::NullText, 0),
            f(Req::Skip(4), 0),
            f(Req::TopicNames, 0),
            f(Req::TopicPattern, 1),
            f(Req::NullText, 0),
            f(Req::NullList(&[f(Req::TopicId, 0), f(Req::Partitions, 0)]), 0),
        ],
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 0),
            f(Resp::NullText, 0),
            f(Resp::NullText, 0),
            f(Resp::Zeros(8), 0),
            f(Resp::NullStruct, 0),
        ],
    ),
    plain(69, "consumergroupdescribe", 1, 0, &[]),
    unread(70, "controllerregistration"),
    plain(
        71,
        "gettelemetrysubscriptions",
        0,
        0,
        &[
            f(THROTTLE, 0),
            f(Resp::Error, 0),
            f(Resp::Zeros(20), 0),
            f(Resp::Empty, 0),
            f(Resp::Zeros(9), 0),
            f(Resp::Empty, 0),
        ],
    ),
    plain(72, "pushtelemetry", 0, 0, ERROR_ONLY),
    unread(73, "assignreplicastodirs"),
    // An empty list of types stands for all resources, also topics, and the types are not read.
    api(
        74,
        "listconfigresources",
        1,
        0,
        Unread,
        &[],
        &[f(THROTTLE, 0), f(Resp::Error, 0), f(Resp::Empty, 0)],
    ),
    api(
        75,
        "describetopicpartitions",
        0,
        0,
        Read,
        &[
            f(Req::AllIfEmpty(&[f(Req::Topic, 0)]), 0),
            f(Req::Skip(4), 0),
            f(Req::NullStruct(&[f(Req::Topic, 0), f(Req::Skip(4), 0)]), 0),
        ],
        &[
            f(THROTTLE, 0),
            f(
                Resp::Topics(&[
                    f(Resp::ItemError, 0),
                    f(Resp::Name, 0),
                    f(Resp::Zeros(17), 0),
                    f(Resp::Empty, 0),
                    f(Resp::NoOperations, 0),
                ]),
                0,
            ),
            f(Resp::NullStruct, 0),
        ],
    ),
    unread(76, "sharegroupheartbeat"),
    plain(77, "sharegroupdescribe", 1, 0, &[]),
    unread(78, "sharefetch"),
    unread(79, "shareacknowledge"),
    unread(80, "addraftvoter"),
    unread(81, "removeraftvoter"),
    unread(82, "updateraftvoter"),
    unread(83, "initializesharegroupstate"),
    unread(84, "readsharegroupstate"),
    unread(85, "writesharegroupstate"),
    unread(86, "deletesharegroupstate"),
    unread(87, "readsharegroupstatesummary"),
    unread(88, "streamsgroupheartbeat"),
    plain(89, "streamsgroupdescribe", 0, 0, &[]),
    unread(90, "describesharegroupoffsets"),
    unread(91, "altersharegroupoffsets"),
    unread(92, "deletesharegroupoffsets"),
];

const OFFSET_FETCH_PARTITION: &[Field<Resp>] = &[
    f(Resp::Index, 0),
    f(Resp::Ones(8), 0),
    f(Resp::Ones(4), 5),
    f(Resp::NullText, 0),
    f(Resp::ItemError, 0),
];

/// Returns the messages of an API key; none if it is not known.
fn of_key(key: i16) -> Option<&'static Api> {
    // The index in the table is the key, which a test checks.
    usize::try_from(key).ok().and_then(|index| APIS.get(index))
}

/// Returns the messages of an API key; none if the table does not have the version.
pub(super) fn find(key: i16, version: i16) -> Option<&'static Api> {
    of_key(key).filter(|api| (0..=api.last).contains(&version))
}

pub(super) fn is_flexible(key: i16, version: i16) -> bool {
    of_key(key).is_some_and(|api| version >= api.flexible)
}

/// Returns whether requests name topics; none if the API key or the version is not known. A broker refuses versions
/// of `ApiVersions` that it does not know and sends its own (KIP-511), so all versions of that key are known.
#[must_use]
pub fn topics_of(key: i16, version: i16) -> Option<Topics> {
    if key == API_VERSIONS {
        return Some(Topics::None);
    }
    let api = of_key(key)?;
    (api.topics == Topics::Unread || version <= api.last).then_some(api.topics)
}

/// Returns the last version of an API key that is known; none if no version is.
#[must_use]
pub fn last_version(key: i16) -> Option<i16> {
    of_key(key).map(|api| api.last).filter(|version| *version >= 0)
}

/// Returns whether a request with an empty array of topics is about all of them.
#[must_use]
pub fn empty_means_all(key: i16, version: i16) -> bool {
    let fields = find(key, version).map_or(&[][..], |api| api.request);
    let mut kinds = fields
        .iter()
        .filter(|field| field.is_in(version))
        .map(|field| field.kind);
    kinds.any(|kind| matches!(kind, Req::AllIfEmpty(_)) || matches!(kind, Req::AllList(_)) && version == 0)
}

/// Returns the name of an API key in lower case, as policies and flow records have it.
#[must_use]
pub fn api_name(key: i16) -> Option<&'static str> {
    of_key(key).map(|api| api.name)
}

/// Returns the API key with a name; case is ignored.
#[must_use]
pub fn api_key(name: &str) -> Option<i16> {
    APIS.iter()
        .find(|api| api.name.eq_ignore_ascii_case(name))
        .map(|api| api.key)
}

/// Returns the names of all API keys, in their order.
pub fn api_names() -> impl Iterator<Item = &'static str> {
    APIS.iter().map(|api| api.name)
}

#[cfg(test)]
mod tests {
    use super::{
        super::numbers::{DESCRIBE_TOPIC_PARTITIONS, METADATA, PRODUCE},
        *,
    };

    #[test]
    fn the_index_of_an_api_is_its_key() {
        for (index, api) in APIS.iter().enumerate() {
            assert_eq!(usize::try_from(api.key).unwrap(), index, "{}", api.name);
        }
    }

    #[test]
    fn an_empty_array_means_all_topics_in_some_versions() {
        let metadata = of_key(METADATA).unwrap();
        assert!(empty_means_all(METADATA, 0) && !empty_means_all(METADATA, 1));
        assert!(!empty_means_all(METADATA, metadata.last + 1));
        assert!(empty_means_all(DESCRIBE_TOPIC_PARTITIONS, 0) && !empty_means_all(PRODUCE, 0));
        assert_eq!(last_version(METADATA), Some(metadata.last));
        assert_eq!((last_version(200), last_version(78)), (None, None));
    }

    #[test]
    fn an_api_whose_topics_are_read_has_a_request_and_a_response() {
        for api in APIS.iter().filter(|api| api.topics == Topics::Read) {
            assert!(
                !api.request.is_empty() && !api.response.is_empty(),
                "{}",
                api.name
            );
        }
    }
}
