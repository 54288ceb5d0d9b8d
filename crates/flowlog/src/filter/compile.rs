//! Compilation of filters: every value is checked, and every field that is set is either evaluated or refused.

use super::{
    api::{ApiFilter, ApiFilters, Experimental, PalisadeFilter},
    model::{EndpointName, Filters, FlowFilter, LabelSelector, Pattern, Sided},
    parse::{self, Result as Parsed, ValueError},
};
use crate::Uuid;

/// Error for a flag or a field of a filter.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FilterError {
    /// The value of a flag is invalid.
    #[error("--{flag} {value}: {problem}")]
    Value {
        /// Flag, without dashes.
        flag: String,
        /// Value as given.
        value: String,
        /// Description of the problem, with a valid example.
        problem: ValueError,
    },
    /// The value of a field is invalid, or Palisade does not support the field.
    #[error("filter field {field}: {value}: {problem}")]
    Field {
        /// Name of the field in the flow API.
        field: &'static str,
        /// Value as given.
        value: String,
        /// Description of the problem, with a valid example.
        problem: ValueError,
    },
    /// Too many regular expressions.
    #[error("{0} regular expressions in one request; at most {MAX_PATTERNS} are possible: join some with |")]
    TooManyPatterns(usize),
    /// Too many values.
    #[error(
        "{0} values in the filters of one request; at most {MAX_VALUES} are possible. Each requirement of a label \
         selector and each item of a list counts as one"
    )]
    TooManyValues(usize),
    /// No such flag.
    #[error("--{0} is not a filter")]
    Unknown(String),
    /// Two flags about the same property: one for either end, one for one end.
    #[error("--{0} and --{1} cannot be combined: use --{1} alone, or --{0} alone")]
    Conflict(String, String),
    /// The name of a pod has another namespace than those of a flag.
    #[error("--{flag} {namespaces} and the name {pod} cannot be combined: {pod} is in another namespace")]
    OtherNamespace {
        /// Flag with the namespaces, without dashes.
        flag: String,
        /// Its namespaces.
        namespaces: String,
        /// Name as given.
        pod: String,
    },
    /// `--not` is not followed by a filter.
    #[error("--not must stand before the filter that it reverses; there is none after it")]
    DanglingNot,
    /// `--not` precedes a flag that is not a filter.
    #[error(
        "--not cannot reverse --{0}: use --since for a beginning, --until for an end, --denylist for filters to exclude"
    )]
    NotReversible(String),
}

/// Largest number of regular expressions in the filters of one request. Each can take
/// [`PATTERN_SIZE`](super::parse::PATTERN_SIZE) bytes, and the daemon compiles those of every client.
const MAX_PATTERNS: usize = 64;

/// Largest number of values in the filters of one request, with the requirements of label selectors. Every flow can be
/// compared with every value.
const MAX_VALUES: usize = 1_024;

/// Longest value that an error repeats, characters.
const MAX_ECHO_CHARS: usize = 100;

const NO_SERVICES: &str =
    "Palisade has no Kubernetes services; use the address, the name or the labels of the endpoints";
const NO_CLUSTER: &str = "a node of Palisade belongs to no cluster; filter by node name or node labels";
const NO_NAT: &str = "Palisade does not translate addresses; use the source address";
const NO_IP_TRACE: &str = "Palisade does not record IP options; use trace_id for traces of HTTP requests";
const NO_ENCRYPTION: &str = "Palisade does not know whether packets are encrypted";
const NO_CEL: &str = "Palisade does not evaluate CEL expressions; use the other fields";

impl FlowFilter {
    /// Compiles a filter.
    ///
    /// # Errors
    /// [`FilterError::Field`] with the name of the field, if a value is invalid or a node cannot evaluate the property.
    pub fn compile(filter: &ApiFilter) -> Result<Self, FilterError> {
        refuse("source_service", filter.source_service.first(), NO_SERVICES)?;
        refuse(
            "destination_service",
            filter.destination_service.first(),
            NO_SERVICES,
        )?;
        refuse(
            "source_cluster_name",
            filter.source_cluster_name.first(),
            NO_CLUSTER,
        )?;
        refuse(
            "destination_cluster_name",
            filter.destination_cluster_name.first(),
            NO_CLUSTER,
        )?;
        refuse("source_ip_xlated", filter.source_ip_xlated.first(), NO_NAT)?;
        refuse("ip_trace_id", filter.ip_trace_id.first(), NO_IP_TRACE)?;
        refuse("ip_trace_option", filter.ip_trace_option.first(), NO_IP_TRACE)?;
        refuse("encrypted", filter.encrypted.first(), NO_ENCRYPTION)?;
        refuse(
            "experimental.cel_expression",
            filter.experimental.cel_expression.first(),
            NO_CEL,
        )?;
        check_counts(std::slice::from_ref(filter).iter())?;
        let texts = |field, values: &[String]| all(field, values, |text| parse::name(text));
        Ok(Self {
            uuid: all("uuid", &filter.uuid, |text| {
                Uuid::parse(text).ok_or_else(|| {
                    "not a UUID, such as 8a3c5e10-7f2b-8c41-9000-00000000002a; -o json shows those of flows".into()
                })
            })?,
            ip: Sided {
                source: all("source_ip", &filter.source_ip, |text| parse::net(text))?,
                destination: all("destination_ip", &filter.destination_ip, |text| parse::net(text))?,
            },
            label: Sided {
                source: all("source_label", &filter.source_label, |text| {
                    LabelSelector::parse(text)
                })?,
                destination: all("destination_label", &filter.destination_label, |text| {
                    LabelSelector::parse(text)
                })?,
            },
            identity: Sided {
                source: filter.source_identity.clone(),
                destination: filter.destination_identity.clone(),
            },
            pod: Sided {
                source: all("source_pod", &filter.source_pod, |text| Ok(pod(text)))?,
                destination: all("destination_pod", &filter.destination_pod, |text| Ok(pod(text)))?,
            },
            endpoint: Sided {
                source: all(
                    "palisade.source_endpoint",
                    &filter.palisade.source_endpoint,
                    |text| Ok(endpoint(text)),
                )?,
                destination: all(
                    "palisade.destination_endpoint",
                    &filter.palisade.destination_endpoint,
                    |text| Ok(endpoint(text)),
                )?,
            },
            workload: Sided {
                source: filter.source_workload.clone(),
                destination: filter.destination_workload.clone(),
            },
            port: Sided {
                source: all("source_port", &filter.source_port, |text| parse::port(text))?,
                destination: all("destination_port", &filter.destination_port, |text| {
                    parse::port(text)
                })?,
            },
            fqdn: Sided {
                source: texts("source_fqdn", &filter.source_fqdn)?,
                destination: texts("destination_fqdn", &filter.destination_fqdn)?,
            },
            protocol: all("protocol", &filter.protocol, |text| parse::protocol(text))?.concat(),
            verdict: all("verdict", &filter.verdict, |value| parse::verdict(&value.0))?,
            drop_reason_desc: all("drop_reason_desc", &filter.drop_reason_desc, |value| {
                parse::drop_reason(&value.0)
            })?,
            event_type: filter.event_type.clone(),
            traffic_direction: all("traffic_direction", &filter.traffic_direction, |value| {
                parse::direction(&value.0)
            })?,
            reply: filter.reply.clone(),
            ip_version: all("ip_version", &filter.ip_version, |value| parse::version(&value.0))?,
            tcp_flags: all("tcp_flags", &filter.tcp_flags, parse::tcp_flags)?,
            interface: filter.interface.clone(),
            node_name: all("node_name", &filter.node_name, |text| node_name(text))?,
            node_labels: all("node_labels", &filter.node_labels, |text| {
                LabelSelector::parse(text)
            })?,
            dns_query: all("dns_query", &filter.dns_query, |text| Pattern::parse(text))?,
            http_status_code: all("http_status_code", &filter.http_status_code, |text| {
                parse::status(text)
            })?,
            http_method: all("http_method", &filter.http_method, |text| parse::method(text))?,
            http_path: all("http_path", &filter.http_path, |text| Pattern::parse(text))?,
            http_url: all("http_url", &filter.http_url, |text| Pattern::parse(text))?,
            http_header: filter.http_header.clone(),
            trace_id: filter.trace_id.clone(),
            sni: texts("palisade.sni", &filter.palisade.sni)?,
        })
    }
}

impl Filters {
    /// Compiles the filters of a request.
    ///
    /// # Errors
    /// As [`FlowFilter::compile`].
    pub fn compile(filters: &ApiFilters) -> Result<Self, FilterError> {
        check_counts(filters.allowlist.iter().chain(&filters.denylist))?;
        let compile = |list: &[ApiFilter]| list.iter().map(FlowFilter::compile).collect::<Result<_, _>>();
        Ok(Self {
            whitelist: compile(&filters.allowlist)?,
            blacklist: compile(&filters.denylist)?,
            since: filters.since,
            until: filters.until,
        })
    }
}

/// # Errors
/// Fails if filters have too many regular expressions or values.
fn check_counts<'a>(filters: impl Iterator<Item = &'a ApiFilter> + Clone) -> Result<(), FilterError> {
    let patterns = filters.clone().map(patterns).sum();
    if patterns > MAX_PATTERNS {
        return Err(FilterError::TooManyPatterns(patterns));
    }
    let values = filters.map(values).sum();
    if values > MAX_VALUES {
        return Err(FilterError::TooManyValues(values));
    }
    Ok(())
}

/// Returns the number of values of a filter. Every field is named, so that a field that is added is not forgotten.
fn values(filter: &ApiFilter) -> usize {
    let ApiFilter {
        uuid,
        source_ip,
        source_ip_xlated,
        source_pod,
        source_fqdn,
        source_label,
        source_service,
        source_workload,
        source_cluster_name,
        destination_ip,
        destination_pod,
        destination_fqdn,
        destination_label,
        destination_service,
        destination_workload,
        destination_cluster_name,
        traffic_direction,
        verdict,
        drop_reason_desc,
        interface,
        event_type,
        http_status_code,
        protocol,
        source_port,
        destination_port,
        reply,
        dns_query,
        source_identity,
        destination_identity,
        http_method,
        http_path,
        http_url,
        http_header,
        tcp_flags,
        node_name,
        node_labels,
        ip_version,
        trace_id,
        ip_trace_id,
        ip_trace_option,
        encrypted,
        palisade:
            PalisadeFilter {
                source_endpoint,
                destination_endpoint,
                sni,
            },
        experimental: Experimental { cel_expression },
    } = filter;
    // Requirements and their values have commas between them.
    let lists = [source_label, destination_label, node_labels, protocol];
    let in_lists = lists.into_iter().flatten().map(|list| list.split(',').count());
    let texts = [
        uuid,
        source_ip,
        source_ip_xlated,
        source_pod,
        source_fqdn,
        source_service,
        source_cluster_name,
        destination_ip,
        destination_pod,
        destination_fqdn,
        destination_service,
        destination_cluster_name,
        http_status_code,
        source_port,
        destination_port,
        dns_query,
        http_method,
        http_path,
        http_url,
        node_name,
        trace_id,
        source_endpoint,
        destination_endpoint,
        sni,
        cel_expression,
    ];
    let enums = [traffic_direction, verdict, drop_reason_desc, ip_version];
    in_lists.sum::<usize>()
        + texts.map(Vec::len).iter().sum::<usize>()
        + enums.map(Vec::len).iter().sum::<usize>()
        + source_workload.len()
        + destination_workload.len()
        + interface.len()
        + event_type.len()
        + reply.len()
        + source_identity.len()
        + destination_identity.len()
        + http_header.len()
        + tcp_flags.len()
        + ip_trace_id.len()
        + ip_trace_option.len()
        + encrypted.len()
}

/// Returns the number of regular expressions of a filter.
fn patterns(filter: &ApiFilter) -> usize {
    filter.dns_query.len() + filter.http_path.len() + filter.http_url.len()
}

/// Compiles the values of a field.
fn all<V: std::fmt::Debug, T>(
    field: &'static str,
    values: &[V],
    parse: impl Fn(&V) -> Parsed<T>,
) -> Result<Vec<T>, FilterError> {
    let one = |value: &V| {
        parse(value).map_err(|problem| FilterError::Field {
            field,
            value: echo(value),
            problem,
        })
    };
    values.iter().map(one).collect()
}

/// Returns an error if a field has a value that Palisade does not support.
fn refuse<V: std::fmt::Debug>(
    field: &'static str,
    value: Option<&V>,
    why: &'static str,
) -> Result<(), FilterError> {
    match value {
        Some(value) => Err(FilterError::Field {
            field,
            value: echo(value),
            problem: why.into(),
        }),
        None => Ok(()),
    }
}

/// Returns a value as an error repeats it: a long one only from its beginning, since a client chooses the length.
fn echo(value: &impl std::fmt::Debug) -> String {
    let mut text = format!("{value:?}");
    if let Some((end, _)) = text.char_indices().nth(MAX_ECHO_CHARS) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// Parses `[NAMESPACE/]PREFIX` as the flow API defines it: without a namespace it is `default`, an empty one means any.
fn pod(text: &str) -> EndpointName {
    let (namespace, prefix) = text.split_once('/').unwrap_or(("default", text));
    EndpointName {
        id: None,
        namespace: (!namespace.is_empty()).then(|| namespace.into()),
        prefix: prefix.into(),
    }
}

/// Parses `[NAMESPACE/]PREFIX`, where no namespace means any, or the number of an endpoint.
fn endpoint(text: &str) -> EndpointName {
    match text.split_once('/') {
        Some((namespace, prefix)) => EndpointName {
            id: None,
            namespace: (!namespace.is_empty()).then(|| namespace.into()),
            prefix: prefix.into(),
        },
        None => EndpointName {
            id: text.parse().ok(),
            namespace: None,
            prefix: text.into(),
        },
    }
}

/// Returns the pattern for the name of a node. Before a `/` the flow API has a pattern for the name of the cluster, which
/// must be empty or match every name here.
fn node_name(text: &str) -> Parsed<String> {
    match text.split_once('/') {
        None if text.is_empty() => Err("a name is missing".into()),
        None => parse::bounded_name(text.to_owned()),
        Some(("" | "*" | "default", "")) => Ok("*".into()),
        Some(("" | "*" | "default", name)) => parse::bounded_name(name.to_owned()),
        Some(_) => Err(NO_CLUSTER.into()),
    }
}
