//! `-o` of the listings.

use clap::Args;

use super::json_path::JsonPath;

/// Format of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub(crate) enum Output {
    /// Table for reading.
    #[default]
    Table,
    /// JSON for programs.
    Json,
    /// Values of the JSON. The command line is parsed once, so the template lives as long as the process.
    JsonPath(&'static JsonPath),
}

/// `-o` of the listings.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArgs {
    /// Output format: table, json, or jsonpath=TEMPLATE.
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        default_value = "table",
        value_parser = output,
        help = "Output format: table, json, or jsonpath=TEMPLATE for values of the JSON ('{[*].id}')"
    )]
    pub output: Output,
}

fn output(text: &str) -> Result<Output, String> {
    match (text, text.strip_prefix("jsonpath=")) {
        ("table", _) => Ok(Output::Table),
        ("json", _) => Ok(Output::Json),
        (_, Some(template)) => {
            JsonPath::parse(template).map(|path| Output::JsonPath(Box::leak(Box::new(path))))
        }
        _ => Err("it is one of table, json, jsonpath=TEMPLATE".to_owned()),
    }
}
