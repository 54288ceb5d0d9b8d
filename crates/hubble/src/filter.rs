//! Filters of a request.

use std::collections::BTreeMap;

use palisade_flowlog::{
    Filters,
    filter::{
        ApiFilter, ApiFilters, EnumValue, EventTypeFilter, Experimental, InterfaceFilter, PalisadeFilter,
    },
    flow::{HttpHeader, Workload},
};
use tonic::Status;

use crate::{
    proto::{flow as pb, observer::GetFlowsRequest},
    schema,
};

/// Maximum number of filters of a request.
const MAX_FILTERS: usize = schema::MAX_MESSAGES_PER_FIELD;
/// Maximum number of regular expressions of a request.
const MAX_PATTERNS: usize = 32;

/// Returns whether a request has regular expressions.
pub(crate) fn has_patterns(request: &GetFlowsRequest) -> bool {
    patterns(request) > 0
}

fn patterns(request: &GetFlowsRequest) -> usize {
    let all = request.whitelist.iter().chain(&request.blacklist);
    all.map(|filter| filter.dns_query.len() + filter.http_path.len() + filter.http_url.len())
        .sum()
}

/// Returns the filters of a request, without its times.
///
/// # Errors
/// `INVALID_ARGUMENT`, with the name of the field, if a filter has no meaning on this node or a value is not valid.
pub(crate) fn filters(request: &GetFlowsRequest) -> Result<Filters, Status> {
    let all = || request.whitelist.iter().chain(&request.blacklist);
    if all().count() > MAX_FILTERS {
        return Err(Status::invalid_argument(format!(
            "whitelist and blacklist have more than {MAX_FILTERS} filters"
        )));
    }
    if patterns(request) > MAX_PATTERNS {
        return Err(Status::invalid_argument(format!(
            "dns_query, http_path and http_url have more than {MAX_PATTERNS} regular expressions"
        )));
    }
    let api = ApiFilters {
        allowlist: request.whitelist.iter().map(filter).collect(),
        denylist: request.blacklist.iter().map(filter).collect(),
        ..ApiFilters::default()
    };
    Filters::compile(&api).map_err(|error| Status::invalid_argument(error.to_string()))
}

/// Converts a filter field by field. Every field is named, so that a field that is added to the definition is not
/// forgotten.
fn filter(filter: &pb::FlowFilter) -> ApiFilter {
    let pb::FlowFilter {
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
        encrypted,
        experimental,
    } = filter.clone();
    ApiFilter {
        uuid,
        source_ip,
        source_ip_xlated,
        source_pod,
        source_fqdn,
        source_label,
        source_service,
        source_workload: workloads(source_workload),
        source_cluster_name,
        destination_ip,
        destination_pod,
        destination_fqdn,
        destination_label,
        destination_service,
        destination_workload: workloads(destination_workload),
        destination_cluster_name,
        traffic_direction: numbers(traffic_direction),
        verdict: numbers(verdict),
        drop_reason_desc: numbers(drop_reason_desc),
        interface: interface
            .into_iter()
            .map(|pb::NetworkInterface { index, name }| InterfaceFilter { index, name })
            .collect(),
        event_type: event_type
            .into_iter()
            .map(|event| EventTypeFilter {
                kind: event.r#type,
                match_sub_type: event.match_sub_type,
                sub_type: event.sub_type,
            })
            .collect(),
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
        http_header: http_header
            .into_iter()
            .map(|pb::HttpHeader { key, value }| HttpHeader { key, value })
            .collect(),
        tcp_flags: tcp_flags.iter().map(tcp_flag_names).collect(),
        node_name,
        node_labels,
        ip_version: numbers(ip_version),
        trace_id,
        ip_trace_id,
        ip_trace_option: Vec::new(),
        encrypted,
        palisade: PalisadeFilter::default(),
        experimental: Experimental {
            cel_expression: experimental.unwrap_or_default().cel_expression,
        },
    }
}

fn numbers(numbers: Vec<i32>) -> Vec<EnumValue> {
    numbers.into_iter().map(EnumValue::from).collect()
}

fn workloads(workloads: Vec<pb::Workload>) -> Vec<Workload> {
    let workload = |pb::Workload { name, kind }| Workload {
        name: name.into(),
        kind: kind.into(),
    };
    workloads.into_iter().map(workload).collect()
}

fn tcp_flag_names(flags: &pb::TcpFlags) -> BTreeMap<String, bool> {
    let all = [
        ("FIN", flags.fin),
        ("SYN", flags.syn),
        ("RST", flags.rst),
        ("PSH", flags.psh),
        ("ACK", flags.ack),
        ("URG", flags.urg),
        ("ECE", flags.ece),
        ("CWR", flags.cwr),
        ("NS", flags.ns),
    ];
    let set = all.into_iter().filter(|(_, on)| *on);
    set.map(|(name, on)| (name.to_owned(), on)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(filter: pb::FlowFilter) -> String {
        let request = GetFlowsRequest {
            whitelist: vec![filter],
            ..GetFlowsRequest::default()
        };
        let status = filters(&request).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        status.message().to_owned()
    }

    #[test]
    fn filters_without_a_meaning_here_are_refused_by_name() {
        let one = || vec!["x".to_owned()];
        let default = pb::FlowFilter::default;
        let cases = [
            (
                "source_service",
                pb::FlowFilter {
                    source_service: one(),
                    ..default()
                },
            ),
            (
                "destination_service",
                pb::FlowFilter {
                    destination_service: one(),
                    ..default()
                },
            ),
            (
                "source_cluster_name",
                pb::FlowFilter {
                    source_cluster_name: one(),
                    ..default()
                },
            ),
            (
                "destination_cluster_name",
                pb::FlowFilter {
                    destination_cluster_name: one(),
                    ..default()
                },
            ),
            (
                "source_ip_xlated",
                pb::FlowFilter {
                    source_ip_xlated: one(),
                    ..default()
                },
            ),
            (
                "ip_trace_id",
                pb::FlowFilter {
                    ip_trace_id: vec![1],
                    ..default()
                },
            ),
            (
                "encrypted",
                pb::FlowFilter {
                    encrypted: vec![true],
                    ..default()
                },
            ),
            (
                "cel_expression",
                pb::FlowFilter {
                    experimental: Some(pb::flow_filter::Experimental {
                        cel_expression: one(),
                    }),
                    ..default()
                },
            ),
            (
                "source_ip",
                pb::FlowFilter {
                    source_ip: one(),
                    ..default()
                },
            ),
            (
                "uuid",
                pb::FlowFilter {
                    uuid: one(),
                    ..default()
                },
            ),
            (
                "verdict",
                pb::FlowFilter {
                    verdict: vec![77],
                    ..default()
                },
            ),
            (
                "ip_version",
                pb::FlowFilter {
                    ip_version: vec![5],
                    ..default()
                },
            ),
            (
                "http_path",
                pb::FlowFilter {
                    http_path: vec!["(".into()],
                    ..default()
                },
            ),
            (
                "tcp_flags",
                pb::FlowFilter {
                    tcp_flags: vec![pb::TcpFlags {
                        ns: true,
                        ..pb::TcpFlags::default()
                    }],
                    ..default()
                },
            ),
        ];
        for (field, filter) in cases {
            let said = refused(filter);
            assert!(said.contains(field), "{field}: {said}");
        }
    }

    #[test]
    fn the_number_of_filters_and_patterns_is_bounded() {
        let mut request = GetFlowsRequest {
            blacklist: vec![pb::FlowFilter::default(); MAX_FILTERS],
            ..GetFlowsRequest::default()
        };
        assert!(filters(&request).is_ok());
        request.blacklist.push(pb::FlowFilter::default());
        assert!(filters(&request).is_err());
        let patterns = |count| pb::FlowFilter {
            http_url: vec!["^/a".to_owned(); count],
            ..pb::FlowFilter::default()
        };
        request.blacklist = vec![patterns(MAX_PATTERNS)];
        assert!(filters(&request).is_ok());
        request.whitelist = vec![patterns(1)];
        assert!(filters(&request).is_err());
    }
}
