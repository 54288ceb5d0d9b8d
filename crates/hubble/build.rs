//! Compiles the definitions in `proto` to message types, service traits, and a table of all messages and fields
//! (`schema.rs`), by which requests are checked for unknown fields and field masks are applied. The definitions themselves
//! (`definitions.bin`) describe the messages of a client, which are read and written as JSON.

use std::{collections::BTreeMap, env, error::Error, fmt::Write as _, fs, path::PathBuf};

use prost::Message as _;
use prost_types::{
    DescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use tonic_build::manual::{Builder, Method, Service};

const FILES: [&str; 5] = [
    "flow/flow.proto",
    "relay/relay.proto",
    "observer/observer.proto",
    "peer/peer.proto",
    "grpc/health/v1/health.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("schema.rs"), schema(&files))?;
    fs::write(out.join("definitions.bin"), files.encode_to_vec())?;
    let mut config = prost_build::Config::new();
    config
        .out_dir(&out)
        .disable_comments(["."])
        .enable_type_names()
        .include_file("messages.rs")
        .compile_fds(files)?;
    // The generator of the build crate replaces the file of a service of the same package, so the services are written
    // to a folder of their own.
    let services = out.join("services");
    fs::create_dir_all(&services)?;
    Builder::new()
        .build_client(false)
        .out_dir(services)
        .compile(&services_of_the_api());
    Ok(())
}

fn services_of_the_api() -> [Service; 3] {
    let observer = [
        ("get_flows", "GetFlows", "crate::wire::Encoded", true),
        ("get_agent_events", "GetAgentEvents", "crate::wire::Encoded", true),
        ("get_debug_events", "GetDebugEvents", "crate::wire::Encoded", true),
        ("get_nodes", "GetNodes", "", false),
        ("get_namespaces", "GetNamespaces", "", false),
        ("server_status", "ServerStatus", "", false),
    ];
    let observer = observer.into_iter().fold(
        Service::builder().name("Observer").package("observer"),
        |service, (name, route, output, stream)| {
            let message = |end: &str| format!("crate::proto::observer::{route}{end}");
            let output = if output.is_empty() {
                message("Response")
            } else {
                output.to_owned()
            };
            service.method(method(name, route, &message("Request"), &output, stream))
        },
    );
    let peer = "crate::proto::peer::";
    let health = "crate::proto::grpc::health::v1::HealthCheck";
    let (request, response) = (format!("{health}Request"), format!("{health}Response"));
    [
        observer.build(),
        Service::builder()
            .name("Peer")
            .package("peer")
            .method(method(
                "notify",
                "Notify",
                &format!("{peer}NotifyRequest"),
                &format!("{peer}ChangeNotification"),
                true,
            ))
            .build(),
        Service::builder()
            .name("Health")
            .package("grpc.health.v1")
            .method(method("check", "Check", &request, &response, false))
            .method(method("watch", "Watch", &request, &response, true))
            .build(),
    ]
}

fn method(name: &str, route: &str, input: &str, output: &str, stream: bool) -> Method {
    let method = Method::builder()
        .name(name)
        .route_name(route)
        .input_type(input)
        .output_type(output)
        .codec_path("crate::wire::Codec");
    if stream {
        method.server_streaming().build()
    } else {
        method.build()
    }
}

/// Returns the table of messages as Rust text.
fn schema(files: &FileDescriptorSet) -> String {
    let mut messages = BTreeMap::new();
    for file in &files.file {
        for message in &file.message_type {
            collect(file.package(), message, &mut messages);
        }
    }
    let index: BTreeMap<&String, usize> = messages.keys().zip(0..).collect();
    let mut text = String::from("&[\n");
    for (name, message) in &messages {
        let _ = writeln!(text, "    Message {{ name: {name:?}, fields: &[");
        for field in &message.field {
            let inner = match field.r#type() {
                Type::Message => format!(
                    "Some({})",
                    index[&field.type_name().trim_start_matches('.').to_owned()]
                ),
                _ => "None".to_owned(),
            };
            let _ = writeln!(
                text,
                "        Field {{ number: {}, name: {:?}, message: {inner}, repeated: {} }},",
                field.number(),
                field.name(),
                field.label() == Label::Repeated,
            );
        }
        text.push_str("    ] },\n");
    }
    text.push(']');
    text
}

fn collect<'a>(scope: &str, message: &'a DescriptorProto, into: &mut BTreeMap<String, &'a DescriptorProto>) {
    let name = format!("{scope}.{}", message.name());
    for nested in &message.nested_type {
        collect(&name, nested, into);
    }
    into.insert(name, message);
}
