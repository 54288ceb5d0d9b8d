//! Construction of filters from command-line flags.

use jiff::tz::TimeZone;

use super::{
    api::{ApiFilter, ApiFilters, InterfaceFilter},
    compile::FilterError,
    flags::FLAGS,
    model::{Filters, FlowFilter},
    parse::{self, Result, ValueError},
};
use crate::{
    Timestamp,
    flow::{HttpHeader, Workload},
};

/// End of a flow to which a flag refers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Source,
    Destination,
    Either,
}

/// Makes filters from flags, in the order of the command line.
///
/// ```
/// use palisade_flowlog::{FilterBuilder, Timestamp};
/// let mut builder = FilterBuilder::new(Timestamp(0));
/// builder.flag("to-port", "443")?;
/// builder.flag("not", "")?;
/// builder.flag("from-ip", "10.0.0.0/8")?;
/// let filters = builder.finish()?;
/// assert_eq!((filters.whitelist.len(), filters.blacklist.len()), (1, 1));
/// # Ok::<(), palisade_flowlog::FilterError>(())
/// ```
#[derive(Clone, Debug)]
pub struct FilterBuilder {
    now: Timestamp,
    zone: TimeZone,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    allow: Pair,
    deny: Pair,
    raw: ApiFilters,
    negate: bool,
}

/// The filters of all flags that `--not` does not reverse, or of all that it reverses. Flags without a side stand for the
/// source in `left` and for the destination in `right`, so a flow matches if the same end matches all of these flags.
#[derive(Clone, Debug, Default)]
struct Pair {
    left: ApiFilter,
    right: ApiFilter,
    /// Namespaces of `--namespace`, `--from-namespace` and `--to-namespace`. They complete the names of pods.
    namespaces: Vec<String>,
    source_namespaces: Vec<String>,
    destination_namespaces: Vec<String>,
    /// Flags that were given, as side and property.
    given: Vec<(Side, String)>,
}

impl FilterBuilder {
    /// Returns a builder without filters. Relative times are subtracted from `now`.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        Self {
            now,
            zone: TimeZone::UTC,
            since: None,
            until: None,
            allow: Pair::default(),
            deny: Pair::default(),
            raw: ApiFilters::default(),
            negate: false,
        }
    }

    /// Sets the time zone of times without an offset; UTC if this is not called.
    #[must_use]
    pub fn in_zone(mut self, zone: TimeZone) -> Self {
        self.zone = zone;
        self
    }

    /// Adds a flag, one of [`FLAGS`], with its value. A value can be a comma-separated list, except for flags whose
    /// single values can contain commas: selectors, regular expressions and header fields.
    ///
    /// # Errors
    /// [`FilterError`] if the flag is unknown, its value is invalid, or the flag cannot follow `--not` or another flag.
    pub fn flag(&mut self, flag: &str, value: &str) -> std::result::Result<(), FilterError> {
        let bad = |problem: ValueError| FilterError::Value {
            flag: flag.into(),
            value: value.into(),
            problem,
        };
        if !FLAGS.iter().any(|known| known.name == flag) {
            return Err(FilterError::Unknown(flag.into()));
        }
        match flag {
            "not" => {
                if self.negate {
                    return Err(FilterError::DanglingNot);
                }
                self.negate = true;
            }
            "since" | "until" => {
                self.refuse_not(flag)?;
                let time = Some(parse::time(value, self.now, &self.zone).map_err(bad)?);
                if flag == "since" {
                    self.since = time;
                } else {
                    self.until = time;
                }
            }
            "allowlist" | "denylist" => {
                self.refuse_not(flag)?;
                let filters = parse::raw_filters(value).map_err(bad)?;
                for filter in &filters {
                    FlowFilter::compile(filter).map_err(|error| bad(error.to_string().into()))?;
                }
                if flag == "allowlist" {
                    self.raw.allowlist.extend(filters);
                } else {
                    self.raw.denylist.extend(filters);
                }
            }
            _ if std::mem::take(&mut self.negate) => self.deny.flag(flag, value)?,
            _ => self.allow.flag(flag, value)?,
        }
        Ok(())
    }

    fn refuse_not(&self, flag: &str) -> std::result::Result<(), FilterError> {
        if self.negate {
            return Err(FilterError::NotReversible(flag.into()));
        }
        Ok(())
    }

    /// Returns the filters in the form of the flow API.
    ///
    /// # Errors
    /// [`FilterError::DanglingNot`] if the last flag was `--not`.
    pub fn finish_api(self) -> std::result::Result<ApiFilters, FilterError> {
        if self.negate {
            return Err(FilterError::DanglingNot);
        }
        let mut filters = ApiFilters {
            allowlist: self.allow.finish()?,
            denylist: self.deny.finish()?,
            since: self.since,
            until: self.until,
        };
        filters.allowlist.extend(self.raw.allowlist);
        filters.denylist.extend(self.raw.denylist);
        Ok(filters)
    }

    /// Returns the filters.
    ///
    /// # Errors
    /// [`FilterError::DanglingNot`] if the last flag was `--not`.
    pub fn finish(self) -> std::result::Result<Filters, FilterError> {
        Filters::compile(&self.finish_api()?)
    }
}

impl Pair {
    fn flag(&mut self, flag: &str, value: &str) -> std::result::Result<(), FilterError> {
        let (side, property) = match flag.split_once('-') {
            Some(("from", property)) => (Side::Source, property),
            Some(("to", property)) => (Side::Destination, property),
            _ => (Side::Either, flag),
        };
        let bad = |problem: ValueError| FilterError::Value {
            flag: flag.into(),
            value: value.into(),
            problem,
        };
        // The value is checked alone first, so that an error names this flag.
        let mut alone = ApiFilter::default();
        let checked = match side {
            Side::Destination => put(&mut alone, Side::Destination, property, value),
            Side::Source | Side::Either => put(&mut alone, Side::Source, property, value),
        };
        checked.map_err(bad)?;
        FlowFilter::compile(&alone).map_err(|error| match error {
            FilterError::Field { problem, .. } => bad(problem),
            other => bad(other.to_string().into()),
        })?;
        for (other, given) in &self.given {
            let is_either = side == Side::Either;
            let of_names = if is_either {
                (property, given.as_str())
            } else {
                (given.as_str(), property)
            };
            // `--namespace` completes names of both ends, so it cannot stand beside the name of one end; and any
            // namespace is not a choice of namespaces.
            let excludes = given == property || matches!(of_names, ("namespace" | "all-namespaces", "pod"));
            let is_contrary = *other == side
                && matches!(
                    of_names,
                    ("namespace", "all-namespaces") | ("all-namespaces", "namespace")
                );
            if is_contrary || excludes && (*other == Side::Either) != is_either {
                return Err(FilterError::Conflict(flag_name(*other, given), flag.into()));
            }
        }
        self.given.push((side, property.into()));
        match property {
            "namespace" | "all-namespaces" => {
                let list = match side {
                    Side::Source => &mut self.source_namespaces,
                    Side::Destination => &mut self.destination_namespaces,
                    Side::Either => &mut self.namespaces,
                };
                list.extend(if property == "namespace" {
                    parse::list(value).map_err(bad)?
                } else {
                    vec![String::new()]
                });
                Ok(())
            }
            _ => {
                let sides = match side {
                    Side::Source => [Side::Source; 2],
                    Side::Destination => [Side::Destination; 2],
                    Side::Either => [Side::Source, Side::Destination],
                };
                put(&mut self.left, sides[0], property, value).map_err(bad)?;
                put(&mut self.right, sides[1], property, value).map_err(bad)
            }
        }
    }

    fn finish(mut self) -> std::result::Result<Vec<ApiFilter>, FilterError> {
        for (side, namespaces, pods) in [
            (Side::Either, &self.namespaces, &self.left.source_pod),
            (Side::Either, &self.namespaces, &self.right.destination_pod),
            (Side::Source, &self.source_namespaces, &self.left.source_pod),
            (
                Side::Destination,
                &self.destination_namespaces,
                &self.right.destination_pod,
            ),
        ] {
            for pod in pods {
                refuse_other_namespace(&flag_name(side, "namespace"), namespaces, pod)?;
            }
        }
        for filter in [&mut self.left, &mut self.right] {
            add_namespaces(&mut filter.source_pod, &self.source_namespaces);
            add_namespaces(&mut filter.destination_pod, &self.destination_namespaces);
        }
        add_namespaces(&mut self.left.source_pod, &self.namespaces);
        add_namespaces(&mut self.right.destination_pod, &self.namespaces);
        Ok(if self.given.is_empty() {
            Vec::new()
        } else if self.left == self.right {
            vec![self.left]
        } else {
            vec![self.left, self.right]
        })
    }
}

/// Returns the flag of a property of an end.
fn flag_name(side: Side, property: &str) -> String {
    match side {
        Side::Source => format!("from-{property}"),
        Side::Destination => format!("to-{property}"),
        Side::Either => property.to_owned(),
    }
}

/// # Errors
/// [`FilterError::OtherNamespace`] if the name of a pod has a namespace that is none of these, so that no flow could
/// match both.
fn refuse_other_namespace(
    flag: &str,
    namespaces: &[String],
    pod: &str,
) -> std::result::Result<(), FilterError> {
    let Some((namespace, _)) = pod.split_once('/').filter(|(namespace, _)| !namespace.is_empty()) else {
        return Ok(());
    };
    // An empty namespace stands for all.
    if namespaces.is_empty()
        || namespaces
            .iter()
            .any(|given| given.is_empty() || given == namespace)
    {
        return Ok(());
    }
    Err(FilterError::OtherNamespace {
        flag: flag.into(),
        namespaces: namespaces.join(","),
        pod: pod.into(),
    })
}

/// Adds the namespaces to each name without one; without names, all names of the namespaces match.
fn add_namespaces(pods: &mut Vec<String>, namespaces: &[String]) {
    if namespaces.is_empty() {
        return;
    }
    if pods.is_empty() {
        pods.push(String::new());
    }
    *pods = pods
        .iter()
        .flat_map(|pod| {
            if pod.contains('/') {
                vec![pod.clone()]
            } else {
                namespaces
                    .iter()
                    .map(|namespace| format!("{namespace}/{pod}"))
                    .collect()
            }
        })
        .collect();
}

/// Adds the value of a flag to the field of its property. Properties without sides ignore `side`.
fn put(filter: &mut ApiFilter, side: Side, property: &str, value: &str) -> Result<()> {
    macro_rules! sided {
        ($source:ident, $destination:ident) => {
            match side {
                Side::Destination => &mut filter.$destination,
                Side::Source | Side::Either => &mut filter.$source,
            }
        };
    }
    match property {
        "uuid" => filter.uuid.extend(parse::list(value)?),
        "ip" => sided!(source_ip, destination_ip).extend(parse::list(value)?),
        "snat-ip" => filter.source_ip_xlated.extend(parse::list(value)?),
        "label" => sided!(source_label, destination_label).push(value.into()),
        "identity" => {
            let identities = parse::list(value)?;
            let identities: Result<Vec<_>> = identities.iter().map(|text| parse::identity(text)).collect();
            sided!(source_identity, destination_identity).extend(identities?);
        }
        "endpoint" => {
            let list = match side {
                Side::Destination => &mut filter.palisade.destination_endpoint,
                Side::Source | Side::Either => &mut filter.palisade.source_endpoint,
            };
            list.extend(parse::list(value)?);
        }
        "pod" => sided!(source_pod, destination_pod).extend(parse::list(value)?),
        // These complete the names of pods at the end.
        "namespace" => {
            parse::list(value)?;
        }
        "all-namespaces" => {}
        "service" => sided!(source_service, destination_service).extend(parse::list(value)?),
        "cluster" => sided!(source_cluster_name, destination_cluster_name).extend(parse::list(value)?),
        "workload" => {
            let workloads = parse::list(value)?;
            sided!(source_workload, destination_workload)
                .extend(workloads.iter().map(|text| parse_workload(text)));
        }
        "port" => sided!(source_port, destination_port).extend(parse::list(value)?),
        "fqdn" => sided!(source_fqdn, destination_fqdn).extend(parse::list(value)?),
        "protocol" => filter.protocol.extend(parse::list(value)?),
        "verdict" => {
            for text in parse::list(value)? {
                filter.verdict.push(parse::verdict(&text)?.as_ref().into());
            }
        }
        "drop-reason-desc" => {
            for text in parse::list(value)? {
                let reason = parse::drop_reason(&text)?;
                filter.drop_reason_desc.push(match reason.name() {
                    Some(name) => name.into(),
                    None => i32::from(reason.0).into(),
                });
            }
        }
        "type" => {
            for text in parse::list(value)? {
                filter.event_type.push(parse::event_type(&text)?);
            }
        }
        "traffic-direction" => {
            for text in parse::list(value)? {
                filter
                    .traffic_direction
                    .push(parse::direction(&text)?.as_ref().into());
            }
        }
        "reply" => {
            for text in parse::list(value)? {
                filter.reply.push(parse::boolean(&text)?);
            }
        }
        "ip-version" => {
            for text in parse::list(value)? {
                filter.ip_version.push(parse::version(&text)?.as_ref().into());
            }
        }
        "ipv4" => filter.ip_version.push("IPv4".into()),
        "ipv6" => filter.ip_version.push("IPv6".into()),
        "tcp-flags" => {
            let flags = parse::list(value)?.into_iter();
            let flags = flags.map(|name| (name.to_ascii_uppercase(), true)).collect();
            parse::tcp_flags(&flags)?;
            filter.tcp_flags.push(flags);
        }
        "interface" => {
            let interfaces = parse::list(value)?.into_iter();
            filter.interface.extend(interfaces.map(|text| match text.parse() {
                Ok(index) => InterfaceFilter {
                    index,
                    name: String::new(),
                },
                Err(_) => InterfaceFilter { index: 0, name: text },
            }));
        }
        "node-name" => filter.node_name.extend(parse::list(value)?),
        "node-label" => filter.node_labels.push(value.into()),
        "http-status" => filter.http_status_code.extend(parse::list(value)?),
        "http-method" => filter.http_method.extend(parse::list(value)?),
        "http-path" => filter.http_path.push(value.into()),
        "http-url" => filter.http_url.push(value.into()),
        "http-header" => filter.http_header.push(parse_header(value)?),
        "trace-id" => filter.trace_id.extend(parse::list(value)?),
        "ip-trace-id" => {
            for text in parse::list(value)? {
                filter
                    .ip_trace_id
                    .push(text.parse().map_err(|_| "not a number above 0")?);
            }
        }
        "ip-trace-option" => {
            for text in parse::list(value)? {
                filter
                    .ip_trace_option
                    .push(text.parse().map_err(|_| "not the number of an IP option")?);
            }
        }
        "cel-expression" => filter.experimental.cel_expression.push(value.into()),
        "encrypted" => filter.encrypted.push(true),
        "unencrypted" => filter.encrypted.push(false),
        "sni" => filter.palisade.sni.extend(parse::list(value)?),
        "dns-query" => filter.dns_query.push(value.into()),
        _ => return Err("not a filter".into()),
    }
    Ok(())
}

/// Parses `[KIND/]NAME` or `KIND/`.
fn parse_workload(text: &str) -> Workload {
    let (kind, name) = text.split_once('/').unwrap_or(("", text));
    Workload {
        name: name.into(),
        kind: kind.into(),
    }
}

fn parse_header(text: &str) -> Result<HttpHeader> {
    match text.split_once(':') {
        Some((name, value)) if !name.trim().is_empty() => Ok(HttpHeader {
            key: name.trim().into(),
            value: value.trim().into(),
        }),
        _ => Err("not a field, such as content-type:text/html".into()),
    }
}
