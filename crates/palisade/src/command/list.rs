//! `palisade list nodes` and `palisade list namespaces`.

use std::path::Path;

use serde_json::Value;

use super::{flow_api::FlowApi, output::show};
use crate::{
    cli::{Output, ServerArgs},
    installation::Installation,
    table::Table,
};

/// Runs `palisade list nodes`.
pub(super) fn nodes(config: &Path, server: &ServerArgs, output: Output) -> anyhow::Result<u8> {
    let answer = connect(config, server)?.call("GetNodes")?;
    show(&list(&answer, "nodes"), output, |nodes, out| {
        let mut table = Table::new(&[
            "NAME",
            "STATUS",
            "AGE",
            "FLOWS/S",
            "CURRENT/MAX-FLOWS",
            "ADDRESS",
            "VERSION",
        ]);
        for node in nodes {
            table.row(node_cells(node));
        }
        write!(out, "{table}")
    })
}

/// Runs `palisade list namespaces`.
pub(super) fn namespaces(config: &Path, server: &ServerArgs, output: Output) -> anyhow::Result<u8> {
    let answer = connect(config, server)?.call("GetNamespaces")?;
    show(&list(&answer, "namespaces"), output, |namespaces, out| {
        let mut table = Table::new(&["NAMESPACE", "CLUSTER"]);
        for namespace in namespaces {
            table.row([text(namespace, "namespace"), text(namespace, "cluster")]);
        }
        write!(out, "{table}")
    })
}

/// Connects to the server of the options, by default to the socket of the flow API of this node.
fn connect(config: &Path, server: &ServerArgs) -> anyhow::Result<FlowApi> {
    let mut server = server.clone();
    if server.server.is_none() {
        let socket = Installation::find(config).hubble_socket;
        server.server = Some(format!("unix://{}", socket.display()));
    }
    FlowApi::connect(&server)
}

fn list(answer: &Value, key: &str) -> Vec<Value> {
    answer[key].as_array().cloned().unwrap_or_default()
}

fn text(object: &Value, key: &str) -> String {
    match object[key].as_str() {
        None | Some("") => "-".to_owned(),
        Some(text) => text.to_owned(),
    }
}

/// Returns a number, which JSON of messages has as text if its type has 64 bits.
fn number(object: &Value, key: &str) -> u64 {
    let value = &object[key];
    let parsed = value.as_str().and_then(|text| text.parse().ok());
    parsed.or_else(|| value.as_u64()).unwrap_or_default()
}

fn node_cells(node: &Value) -> [String; 7] {
    let seconds = number(node, "uptime_ns") as f64 / 1e9;
    let rate = if seconds > 0.0 {
        number(node, "seen_flows") as f64 / seconds
    } else {
        0.0
    };
    let (flows, most) = (number(node, "num_flows"), number(node, "max_flows"));
    let percent = if most > 0 {
        flows as f64 / most as f64 * 100.0
    } else {
        0.0
    };
    let state = text(node, "state");
    [
        text(node, "name"),
        match state.as_str() {
            "NODE_CONNECTED" => "Connected".to_owned(),
            "NODE_UNAVAILABLE" => "Unavailable".to_owned(),
            "NODE_GONE" => "Gone".to_owned(),
            "NODE_ERROR" => "Error".to_owned(),
            _ => state,
        },
        format!("{seconds:.0}s"),
        format!("{rate:.2}"),
        format!("{flows}/{most} ({percent:.1}%)"),
        text(node, "address"),
        text(node, "version"),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_is_one_row() {
        let node = json!({
            "name": "node1", "version": "0.1.0", "address": "10.0.0.1:4244", "state": "NODE_CONNECTED",
            "uptime_ns": "10000000000", "num_flows": "5", "max_flows": "10", "seen_flows": "25",
        });
        assert_eq!(
            node_cells(&node),
            [
                "node1",
                "Connected",
                "10s",
                "2.50",
                "5/10 (50.0%)",
                "10.0.0.1:4244",
                "0.1.0"
            ]
        );
        // A node that is not connected has a name and a state only.
        let gone = json!({"name": "node2", "state": "NODE_UNAVAILABLE"});
        assert_eq!(
            node_cells(&gone),
            ["node2", "Unavailable", "0s", "0.00", "0/0 (0.0%)", "-", "-"]
        );
    }
}
