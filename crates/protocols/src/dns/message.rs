//! Parsers of [`Query`], [`Answer`] and the [`Head`] of an answer. Limits on records, compression pointers and CNAME
//! records bound the time that one message can take.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    CLASS_IN, HEADER_LEN, ParseError,
    name::{MAX_LABEL, Name, NameBuilder},
    rtype,
};

/// Limits on one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum length of a message, bytes.
    pub message: usize,
    /// Maximum number of records in all sections together.
    pub records: u32,
    /// Maximum number of compression pointers that are followed in all names together.
    pub pointers: u32,
}

impl Limits {
    /// Limits for queries: enough for one question, EDNS with padding (RFC 8467) and a signature.
    pub const QUERY: Self = Self {
        message: 4096,
        records: 8,
        pointers: 64,
    };
    /// Limits for answers over UDP and TCP: enough for a round-robin set of a thousand addresses.
    pub const ANSWER: Self = Self {
        message: 65_535,
        records: 2048,
        pointers: 16_384,
    };
}

/// The second 16-bit word of the header, without the response code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Flags(pub u16);

impl Flags {
    /// Returns QR: whether the message is an answer.
    #[must_use]
    pub const fn response(self) -> bool {
        self.0 & 0x8000 != 0
    }

    /// Returns the opcode.
    #[must_use]
    pub const fn opcode(self) -> u8 {
        (self.0 >> 11 & 15) as u8
    }

    /// Returns AA: whether the server is an authority for the name.
    #[must_use]
    pub const fn authoritative(self) -> bool {
        self.0 & 0x0400 != 0
    }

    /// Returns TC: whether the answer was truncated. If it was, the client repeats the query over TCP.
    #[must_use]
    pub const fn truncated(self) -> bool {
        self.0 & 0x0200 != 0
    }

    /// Returns RD: whether the client desires recursion.
    #[must_use]
    pub const fn recursion_desired(self) -> bool {
        self.0 & 0x0100 != 0
    }

    /// Returns CD: whether the client disables DNSSEC validation (RFC 4035, section 3.2.2).
    #[must_use]
    pub const fn checking_disabled(self) -> bool {
        self.0 & 0x0010 != 0
    }
}

/// The question of a query: name, type and class.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Question {
    /// The name.
    pub name: Name,
    /// The type of record, see [`rtype`].
    pub rtype: u16,
    /// The class, see [`CLASS_IN`].
    pub class: u16,
}

/// The fixed part of an EDNS record (RFC 6891, section 6.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns {
    /// Largest UDP payload that the sender accepts, bytes.
    pub udp_payload: u16,
    /// Upper eight bits of the response code.
    pub rcode_high: u8,
    /// The EDNS version; only 0 is defined.
    pub version: u8,
    /// DO: the sender accepts DNSSEC records.
    pub dnssec_ok: bool,
}

/// A query with exactly one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// Message id, which the answer repeats.
    pub id: u16,
    /// Flags; the opcode is QUERY.
    pub flags: Flags,
    /// The one question.
    pub question: Question,
    /// The OPT record, if the query has one.
    pub edns: Option<Edns>,
}

impl Query {
    /// Parses a query without allocating.
    ///
    /// # Errors
    /// [`ParseError`] if the message is not a well-formed query with exactly one question, or exceeds a limit.
    pub fn parse(message: &[u8], limits: &Limits) -> Result<Self, ParseError> {
        let header = Header::parse(message, limits)?;
        if header.flags.response() {
            return Err(ParseError::WrongDirection);
        }
        header.check(limits)?;
        if header.questions == 0 {
            return Err(ParseError::NoQuestion);
        }
        let mut reader = Reader {
            message,
            at: HEADER_LEN,
            pointers: limits.pointers,
        };
        let question = reader.question()?;
        // The query of an incremental zone transfer names the client's version of the zone in the authority section
        // (RFC 1995, section 3).
        if header.answers > 0 || header.authorities > 0 && question.rtype != rtype::IXFR {
            return Err(ParseError::RecordsInQuery);
        }
        reader.skip_records(header.authorities)?;
        let edns = reader.additionals(header.additionals)?;
        reader.end()?;
        Ok(Self {
            id: header.id,
            flags: header.flags,
            question,
            edns,
        })
    }
}

/// Header and question of an answer. The inspector parses only these before the rest of the message has arrived, and
/// for zone transfers, whose records it does not inspect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Message id of the query.
    pub id: u16,
    /// Response code, without the upper bits of EDNS.
    pub rcode: u16,
    /// The question, if the answer repeats it.
    pub question: Option<Question>,
}

impl Head {
    /// Parses the header and the question of an answer.
    ///
    /// # Errors
    /// [`ParseError::Short`] or [`ParseError::Truncated`] if more bytes are needed; any other error if the bytes cannot
    /// be the start of an accepted answer.
    pub fn read(message: &[u8]) -> Result<Self, ParseError> {
        let limits = Limits {
            records: u32::MAX,
            ..Limits::ANSWER
        };
        let header = Header::parse(message, &limits)?;
        if !header.flags.response() {
            return Err(ParseError::WrongDirection);
        }
        header.check(&limits)?;
        let mut reader = Reader {
            message,
            at: HEADER_LEN,
            pointers: limits.pointers,
        };
        let question = (header.questions == 1).then(|| reader.question()).transpose()?;
        Ok(Self {
            id: header.id,
            rcode: header.rcode,
            question,
        })
    }
}

/// The kind of record that an address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// An A or AAAA record.
    Record,
    /// An address hint of an SVCB or HTTPS record (RFC 9460, section 7.3).
    Hint,
}

/// An address in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Time to live of its record, s.
    pub ttl: u32,
    /// The kind of record it comes from.
    pub source: Source,
}

/// The answer to a query: response code, and the addresses of the queried name.
///
/// [`Answer::read`] reuses the capacity of the vectors, so repeated calls on one value do not allocate in the steady
/// state.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Answer {
    /// Message id of the query.
    pub id: u16,
    /// Flags.
    pub flags: Flags,
    /// Response code, with the upper bits of EDNS.
    pub rcode: u16,
    /// The question, if the answer repeats it. Servers omit it in some error responses; an answer without a question
    /// but with records in the answer section is refused.
    pub question: Option<Question>,
    /// The targets of the CNAME chain that starts at the queried name, in order.
    pub aliases: Vec<Name>,
    /// The addresses of the queried name and its aliases, in the order of the message. If there are none and the query
    /// is for A, AAAA or ANY, the addresses of the A and AAAA records with other owners.
    pub addresses: Vec<Address>,
    /// The lowest time to live of the aliases and addresses, s; `None` if the answer has neither.
    pub ttl: Option<u32>,
    /// The OPT record, if the answer has one.
    pub edns: Option<Edns>,
}

/// Maximum number of CNAME records in an answer section.
const ALIASES: usize = 16;

/// A CNAME record: the offsets of its owner and its target in the message, and its time to live.
#[derive(Clone, Copy, Default)]
struct Cname {
    owner: usize,
    target: usize,
    ttl: u32,
}

impl Answer {
    /// Parses an answer into a new value.
    ///
    /// # Errors
    /// See [`Answer::read`].
    pub fn parse(message: &[u8], limits: &Limits) -> Result<Self, ParseError> {
        let mut answer = Self::default();
        answer.read(message, limits)?;
        Ok(answer)
    }

    /// Returns whether the answer was truncated. If it was, the client repeats the query over TCP.
    #[must_use]
    pub fn truncated(&self) -> bool {
        self.flags.truncated()
    }

    /// Parses an answer and replaces this value.
    ///
    /// # Errors
    /// [`ParseError`] if the message is not a well-formed answer, or exceeds a limit. The value then has no question,
    /// names or addresses.
    pub fn read(&mut self, message: &[u8], limits: &Limits) -> Result<(), ParseError> {
        let result = self.read_sections(message, limits);
        if result.is_err() {
            self.clear();
        }
        result
    }

    fn clear(&mut self) {
        self.question = None;
        self.aliases.clear();
        self.addresses.clear();
        self.ttl = None;
        self.edns = None;
    }

    fn read_sections(&mut self, message: &[u8], limits: &Limits) -> Result<(), ParseError> {
        self.clear();
        let header = Header::parse(message, limits)?;
        self.id = header.id;
        self.flags = header.flags;
        self.rcode = header.rcode;
        if !header.flags.response() {
            return Err(ParseError::WrongDirection);
        }
        header.check(limits)?;
        let mut reader = Reader {
            message,
            at: HEADER_LEN,
            pointers: limits.pointers,
        };
        let question = if header.questions == 1 {
            reader.question()?
        } else if header.answers > 0 {
            return Err(ParseError::NoQuestion);
        } else {
            reader.skip_records(header.authorities)?;
            self.edns = reader.additionals(header.additionals)?;
            self.add_rcode_high();
            return reader.end();
        };

        // First pass: check all records up to the last byte, and collect the CNAME records, which can be in any order.
        let section = reader.at;
        let mut addresses = 0_u32;
        let (mut cnames, mut aliases) = ([Cname::default(); ALIASES], 0);
        for _ in 0..header.answers {
            let owner = reader.at;
            reader.skip_name()?;
            let record = reader.record()?;
            match record.rtype {
                rtype::OPT => return Err(ParseError::BadOpt),
                _ if record.class != CLASS_IN => {}
                rtype::CNAME => {
                    let slot = cnames.get_mut(aliases).ok_or(ParseError::TooManyAliases)?;
                    *slot = Cname {
                        owner,
                        target: record.data,
                        ttl: record.ttl,
                    };
                    aliases += 1;
                    let end = reader.at;
                    reader.at = record.data;
                    reader.name()?;
                    if reader.at != end {
                        return Err(ParseError::BadRdata);
                    }
                }
                rtype::A | rtype::AAAA | rtype::SVCB | rtype::HTTPS => addresses += 1,
                _ => {}
            }
        }
        reader.skip_records(header.authorities)?;
        self.edns = reader.additionals(header.additionals)?;
        self.add_rcode_high();
        reader.end()?;

        self.follow_aliases(
            &mut reader,
            &question.name,
            cnames.get(..aliases).unwrap_or_default(),
        )?;

        // Second pass: collect the addresses of the queried name and of the aliases, which are known now.
        if addresses > 0 && question.class == CLASS_IN {
            reader.at = section;
            for _ in 0..header.answers {
                let belongs = reader.owner_is_one_of(&question.name, &self.aliases)?;
                let record = reader.record()?;
                if record.class == CLASS_IN {
                    self.take_addresses(&mut reader, &record, belongs)?;
                }
            }
            self.take_strays(&mut reader, &question, section, header.answers)?;
        }
        self.question = Some(question);
        Ok(())
    }

    fn add_rcode_high(&mut self) {
        if let Some(edns) = self.edns {
            self.rcode |= u16::from(edns.rcode_high) << 4;
        }
    }

    fn lower_ttl(&mut self, ttl: u32) {
        self.ttl = Some(self.ttl.map_or(ttl, |lowest| lowest.min(ttl)));
    }

    /// Follows the CNAME chain of the queried name. A name must not have more than one CNAME record (RFC 2181, section
    /// 10.1), so only the first one of each name is followed.
    fn follow_aliases(
        &mut self,
        reader: &mut Reader<'_>,
        asked: &Name,
        cnames: &[Cname],
    ) -> Result<(), ParseError> {
        'chain: loop {
            let current = self.aliases.last().unwrap_or(asked);
            for cname in cnames {
                if !reader.name_is(cname.owner, current)? {
                    continue;
                }
                reader.at = cname.target;
                let target = reader.name()?;
                if target == *asked || self.aliases.contains(&target) {
                    return Err(ParseError::AliasLoop);
                }
                self.aliases.push(target);
                self.lower_ttl(cname.ttl);
                continue 'chain;
            }
            return Ok(());
        }
    }

    /// Collects the addresses of A and AAAA records with other owners, if neither the queried name nor an alias has an
    /// address and the query is for A, AAAA or ANY.
    ///
    /// Servers that rewrite questions send such answers. musl, c-ares and the resolver of Go use these addresses; glibc
    /// does not. Learning these addresses gives the server no new power, because the server could put the queried name
    /// into the records as their owner.
    fn take_strays(
        &mut self,
        reader: &mut Reader<'_>,
        question: &Question,
        section: usize,
        answers: u16,
    ) -> Result<(), ParseError> {
        if !self.addresses.is_empty() || ![rtype::A, rtype::AAAA, rtype::ANY].contains(&question.rtype) {
            return Ok(());
        }
        reader.at = section;
        for _ in 0..answers {
            reader.skip_name()?;
            let record = reader.record()?;
            if record.class == CLASS_IN && [rtype::A, rtype::AAAA].contains(&record.rtype) {
                self.take_addresses(reader, &record, true)?;
            }
        }
        Ok(())
    }

    /// Checks the data of a record and, if `belongs` is set, adds the record's addresses. The check does not depend on
    /// `belongs`, because some clients also use the addresses of records with other owners.
    fn take_addresses(
        &mut self,
        reader: &mut Reader<'_>,
        record: &Record,
        belongs: bool,
    ) -> Result<(), ParseError> {
        let data = reader
            .message
            .get(record.data..reader.at)
            .ok_or(ParseError::Truncated)?;
        let Record { ttl, .. } = *record;
        let mut add = |ip, source| {
            if belongs {
                self.addresses.push(Address { ip, ttl, source });
            }
        };
        match record.rtype {
            rtype::A => {
                let octets: [u8; 4] = data.try_into().map_err(|_| ParseError::BadRdata)?;
                add(Ipv4Addr::from(octets).into(), Source::Record);
            }
            rtype::AAAA => {
                let octets: [u8; 16] = data.try_into().map_err(|_| ParseError::BadRdata)?;
                add(Ipv6Addr::from(octets).into(), Source::Record);
            }
            rtype::SVCB | rtype::HTTPS => {
                let end = reader.at;
                reader.at = record.data;
                let hints = reader.service_hints(end)?;
                reader.at = end;
                for octets in hints.v4 {
                    add(Ipv4Addr::from(*octets).into(), Source::Hint);
                }
                for octets in hints.v6 {
                    add(Ipv6Addr::from(*octets).into(), Source::Hint);
                }
                // A record without hints has no address, so its time to live does not limit that of the addresses.
                if hints.v4.is_empty() && hints.v6.is_empty() {
                    return Ok(());
                }
            }
            _ => return Ok(()),
        }
        if belongs {
            self.lower_ttl(ttl);
        }
        Ok(())
    }
}

struct Header {
    id: u16,
    flags: Flags,
    rcode: u16,
    questions: u16,
    answers: u16,
    authorities: u16,
    additionals: u16,
}

impl Header {
    fn parse(message: &[u8], limits: &Limits) -> Result<Self, ParseError> {
        let Some(header) = message.first_chunk::<HEADER_LEN>() else {
            return Err(ParseError::Short);
        };
        if message.len() > limits.message {
            return Err(ParseError::TooLong);
        }
        let &[id0, id1, flags0, flags1, qd0, qd1, an0, an1, ns0, ns1, ar0, ar1] = header;
        let flags = u16::from_be_bytes([flags0, flags1]);
        Ok(Self {
            id: u16::from_be_bytes([id0, id1]),
            flags: Flags(flags & 0xfff0),
            rcode: flags & 15,
            questions: u16::from_be_bytes([qd0, qd1]),
            answers: u16::from_be_bytes([an0, an1]),
            authorities: u16::from_be_bytes([ns0, ns1]),
            additionals: u16::from_be_bytes([ar0, ar1]),
        })
    }

    fn check(&self, limits: &Limits) -> Result<(), ParseError> {
        if self.flags.opcode() != 0 {
            return Err(ParseError::Opcode);
        }
        if self.questions > 1 {
            return Err(ParseError::ManyQuestions);
        }
        let records = u32::from(self.answers) + u32::from(self.authorities) + u32::from(self.additionals);
        if records > limits.records {
            return Err(ParseError::TooManyRecords);
        }
        Ok(())
    }
}

/// The fields of a record that follow its owner. [`Reader::record`] leaves the reader at the end of the data.
struct Record {
    rtype: u16,
    class: u16,
    ttl: u32,
    /// Offset of the data in the message.
    data: usize,
}

/// Address hints of an SVCB or HTTPS record.
struct Hints<'a> {
    v4: &'a [[u8; 4]],
    v6: &'a [[u8; 16]],
}

/// A position in a message.
struct Reader<'a> {
    message: &'a [u8],
    /// Offset of the next byte to read.
    at: usize,
    /// Number of compression pointers that may still be followed.
    pointers: u32,
}

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let rest = self.message.get(self.at..).ok_or(ParseError::Truncated)?;
        let bytes = rest.first_chunk::<N>().ok_or(ParseError::Truncated)?;
        self.at += N;
        Ok(*bytes)
    }

    fn word(&mut self) -> Result<u16, ParseError> {
        self.take().map(u16::from_be_bytes)
    }

    fn slice(&mut self, len: usize) -> Result<&'a [u8], ParseError> {
        let slice = self
            .message
            .get(self.at..self.at + len)
            .ok_or(ParseError::Truncated)?;
        self.at += len;
        Ok(slice)
    }

    fn end(&self) -> Result<(), ParseError> {
        if self.at == self.message.len() {
            Ok(())
        } else {
            Err(ParseError::TrailingBytes)
        }
    }

    // This function and `name` are inlined, so that the 255 bytes of a name are built in place and not copied.
    #[inline(always)]
    fn question(&mut self) -> Result<Question, ParseError> {
        let name = self.name()?;
        let [t0, t1, c0, c1] = self.take()?;
        Ok(Question {
            name,
            rtype: u16::from_be_bytes([t0, t1]),
            class: u16::from_be_bytes([c0, c1]),
        })
    }

    fn record(&mut self) -> Result<Record, ParseError> {
        let [t0, t1, c0, c1, a, b, c, d, l0, l1] = self.take()?;
        let ttl = u32::from_be_bytes([a, b, c, d]);
        let record = Record {
            rtype: u16::from_be_bytes([t0, t1]),
            class: u16::from_be_bytes([c0, c1]),
            // A time to live with the most significant bit set is treated as zero (RFC 2181, section 8).
            ttl: if ttl > i32::MAX as u32 { 0 } else { ttl },
            data: self.at,
        };
        self.slice(usize::from(u16::from_be_bytes([l0, l1])))?;
        Ok(record)
    }

    /// Reads a name and follows its compression pointers. Each pointer must point before the run of labels that it ends
    /// (RFC 1035, section 4.1.4: "a prior occurrence"), so there are no loops.
    #[inline(always)]
    fn name(&mut self) -> Result<Name, ParseError> {
        let mut builder = NameBuilder::new();
        let mut at = self.at;
        let mut start = at;
        let mut jumped = false;
        loop {
            let &length = self.message.get(at).ok_or(ParseError::Truncated)?;
            let length = usize::from(length);
            match length {
                0 => {
                    if !jumped {
                        self.at = at + 1;
                    }
                    return Ok(builder.finish());
                }
                1..=MAX_LABEL => {
                    let label = self
                        .message
                        .get(at + 1..at + 1 + length)
                        .ok_or(ParseError::Truncated)?;
                    builder.push(label).map_err(|_| ParseError::NameTooLong)?;
                    at += 1 + length;
                }
                0xc0.. => {
                    let target = self.pointer(at, start)?;
                    self.pointers = self.pointers.checked_sub(1).ok_or(ParseError::TooManyPointers)?;
                    if !jumped {
                        self.at = at + 2;
                        jumped = true;
                    }
                    start = target;
                    at = target;
                }
                _ => return Err(ParseError::LabelType),
            }
        }
    }

    /// Returns whether the name at offset `at` equals `name`. Compares in place and stops at the first difference.
    fn name_is(&mut self, mut at: usize, name: &Name) -> Result<bool, ParseError> {
        let mut start = at;
        let mut rest = name.wire();
        loop {
            let &length = self.message.get(at).ok_or(ParseError::Truncated)?;
            if length >= 0xc0 {
                at = self.pointer(at, start)?;
                start = at;
                self.pointers = self.pointers.checked_sub(1).ok_or(ParseError::TooManyPointers)?;
                continue;
            }
            // `label` starts with its length byte. The length bytes of `name` are below 64 and so are no letters:
            // ignoring ASCII case does not affect their comparison.
            let end = at + 1 + usize::from(length);
            let label = self.message.get(at..end).ok_or(ParseError::Truncated)?;
            let Some((expected, tail)) = rest.split_at_checked(label.len()) else {
                return Ok(false);
            };
            if !label.eq_ignore_ascii_case(expected) {
                return Ok(false);
            }
            if length == 0 {
                return Ok(true);
            }
            at = end;
            rest = tail;
        }
    }

    /// Returns the target of the compression pointer at `at`. The target must be after the header and before `start`.
    fn pointer(&self, at: usize, start: usize) -> Result<usize, ParseError> {
        let &[high, low] = self
            .message
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .ok_or(ParseError::Truncated)?;
        let target = usize::from(u16::from_be_bytes([high & 0x3f, low]));
        if (HEADER_LEN..start).contains(&target) {
            Ok(target)
        } else {
            Err(ParseError::BadPointer)
        }
    }

    /// Skips a name without following its compression pointer.
    fn skip_name(&mut self) -> Result<(), ParseError> {
        let start = self.at;
        loop {
            let &length = self.message.get(self.at).ok_or(ParseError::Truncated)?;
            match usize::from(length) {
                0 => {
                    self.at += 1;
                    return Ok(());
                }
                length @ 1..=MAX_LABEL => self.at += 1 + length,
                0xc0.. => {
                    self.pointer(self.at, start)?;
                    self.at += 2;
                    return Ok(());
                }
                _ => return Err(ParseError::LabelType),
            }
        }
    }

    /// Reads the owner of a record. Returns whether it is the queried name or one of its aliases.
    fn owner_is_one_of(&mut self, asked: &Name, aliases: &[Name]) -> Result<bool, ParseError> {
        // Fast path: most owners are a compression pointer to the question.
        if self.message.get(self.at..).and_then(|rest| rest.first_chunk()) == Some(&[0xc0, HEADER_LEN as u8])
        {
            self.at += 2;
            return Ok(true);
        }
        let owner = self.at;
        self.skip_name()?;
        // Address records usually have the last name of the CNAME chain as their owner, so compare that name first.
        for name in aliases.iter().rev().chain([asked]) {
            if self.name_is(owner, name)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn skip_records(&mut self, count: u16) -> Result<(), ParseError> {
        for _ in 0..count {
            self.skip_name()?;
            if self.record()?.rtype == rtype::OPT {
                return Err(ParseError::BadOpt);
            }
        }
        Ok(())
    }

    /// Reads the additional section. Returns its OPT record and skips all other records.
    fn additionals(&mut self, count: u16) -> Result<Option<Edns>, ParseError> {
        let mut edns = None;
        for _ in 0..count {
            let owner = self.at;
            self.skip_name()?;
            let at_root = self.at == owner + 1;
            let fixed = self.at;
            let record = self.record()?;
            if record.rtype != rtype::OPT {
                continue;
            }
            if !at_root || edns.is_some() {
                return Err(ParseError::BadOpt);
            }
            let end = self.at;
            // In an OPT record the TTL field holds extended response code, version and flags (RFC 6891, section 6.1.3).
            // Read these again: `record` replaces a TTL with the most significant bit set by zero.
            self.at = fixed + 4;
            let [rcode_high, version, flags, _] = self.take()?;
            edns = Some(Edns {
                udp_payload: record.class,
                rcode_high,
                version,
                dnssec_ok: flags & 0x80 != 0,
            });
            self.at = record.data;
            while self.at < end {
                self.word()?;
                let len = self.word()?;
                self.slice(usize::from(len))?;
            }
            if self.at != end {
                return Err(ParseError::BadOpt);
            }
        }
        Ok(edns)
    }

    /// Reads the address hints of SVCB or HTTPS data that ends at offset `end` (RFC 9460, section 2.2).
    fn service_hints(&mut self, end: usize) -> Result<Hints<'a>, ParseError> {
        const IPV4HINT: u16 = 4;
        const IPV6HINT: u16 = 6;
        let mut hints = Hints { v4: &[], v6: &[] };
        if end - self.at < 3 {
            return Err(ParseError::BadSvcParams);
        }
        let priority = self.word()?;
        self.skip_name()?;
        // Priority 0 is AliasMode, in which recipients ignore parameters (RFC 9460, section 2.4.2).
        if priority == 0 && self.at <= end {
            return Ok(hints);
        }
        let mut last = None;
        while self.at < end {
            let key = self.word()?;
            let len = self.word()?;
            let value = self.slice(usize::from(len))?;
            // Keys must be strictly increasing, otherwise the record is malformed (RFC 9460, section 2.2).
            if last.is_some_and(|last| key <= last) || self.at > end {
                return Err(ParseError::BadSvcParams);
            }
            last = Some(key);
            let rest = match key {
                IPV4HINT => {
                    let (addresses, rest) = value.as_chunks();
                    hints.v4 = addresses;
                    rest
                }
                IPV6HINT => {
                    let (addresses, rest) = value.as_chunks();
                    hints.v6 = addresses;
                    rest
                }
                _ => continue,
            };
            if value.is_empty() || !rest.is_empty() {
                return Err(ParseError::BadSvcParams);
            }
        }
        if self.at == end {
            Ok(hints)
        } else {
            Err(ParseError::BadSvcParams)
        }
    }
}
