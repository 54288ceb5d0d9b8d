//! Reads the `[[export]]` sections.

use std::{cell::RefCell, collections::HashMap, path::PathBuf};

use palisade_flowlog::{Filters, FlowFilter, Timestamp, filter::ApiFilter};

use super::{
    labels::dns_name,
    model::Export,
    reader::{Reader, Section},
};
use palisade_flowlog::FieldMask;

/// Maximum number of exports. Each has a thread and a buffer.
const MAX_EXPORTS: usize = 16;
/// Bytes of a MiB, the unit of `max_size`.
const MIB: u64 = 1 << 20;

pub(super) fn read(sections: Vec<Section<'_, '_>>, reader: &Reader<'_>) -> Vec<Export> {
    let mut exports: Vec<Export> = Vec::new();
    let mut files: HashMap<PathBuf, String> = HashMap::new();
    for (number, section) in sections.into_iter().enumerate() {
        if number == MAX_EXPORTS {
            section.error(format!("at most {MAX_EXPORTS} exports: remove some"));
        }
        let name = dns_name(&section, "name", "\"denied\"");
        if let Some(name) = &name
            && exports.iter().any(|other| other.name == name.value)
        {
            section.error_at(name.offset, format!("there is another export {}", name.value));
        }
        let file = section.required_string("file", "\"/var/log/palisade/flows.log\"");
        if let Some(file) = &file {
            let path = PathBuf::from(&file.value);
            let is_file = path.is_absolute() && path.file_name().is_some() && !file.value.ends_with('/');
            if !is_file {
                section.error_at(file.offset, "export.file must be the absolute path of a file");
            } else if let Some(other) = name
                .as_ref()
                .and_then(|name| files.insert(path, name.value.clone()))
            {
                section.error_at(file.offset, format!("export {other} writes this file already"));
            }
        }
        let allow = filters(&section, "allow");
        let deny = filters(&section, "deny");
        let mask = RefCell::new(FieldMask::default());
        let wanted = "a list of fields: [\"time\", \"verdict\", \"source.pod_name\"]";
        section.list("field_mask", wanted, |path| mask.borrow_mut().add(path));
        let max_size = section.integer("max_size", 1..1_000_001).unwrap_or(10);
        let max_backups = section.integer("max_backups", 1..1_001).unwrap_or(5);
        let end = section.string("end").and_then(|at| {
            let time = at.value.parse::<Timestamp>();
            if let Err(problem) = &time {
                reader.error(at.offset, format!("export.end: '{}' is {problem}", at.value));
            }
            time.ok()
        });
        section.finish();
        if let (Some(name), Some(file)) = (name, file) {
            exports.push(Export {
                name: name.value,
                file: file.value.into(),
                filters: Filters {
                    whitelist: allow,
                    blacklist: deny,
                    ..Filters::default()
                },
                field_mask: mask.into_inner(),
                max_size: max_size * MIB,
                max_backups: usize::try_from(max_backups).unwrap_or(usize::MAX),
                end,
            });
        }
    }
    exports
}

/// Returns the filters of a list, each in the JSON form of the flow API.
fn filters(section: &Section<'_, '_>, key: &'static str) -> Vec<FlowFilter> {
    let wanted = "a list of filters in JSON: ['{\"verdict\":[\"DROPPED\"]}']";
    let compiled = section.list(key, wanted, |text| {
        let filter: ApiFilter = serde_json::from_str(text).map_err(|error| {
            format!("'{text}' is no filter ({error}); write for example {{\"verdict\":[\"DROPPED\"]}}")
        })?;
        FlowFilter::compile(&filter).map_err(|error| error.to_string())
    });
    compiled.into_iter().flatten().map(|at| at.value).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;

    const NODE: &str = "[node]\nname = \"n\"\n";

    fn errors(text: &str) -> String {
        let errors = Config::parse(Path::new("/p.toml"), &format!("{NODE}{text}")).unwrap_err();
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        lines.join("\n")
    }

    #[test]
    fn an_export_has_the_defaults_of_ciliums() {
        let text = format!("{NODE}[[export]]\nname = \"all\"\nfile = \"/var/log/palisade/flows.log\"\n");
        let exports = Config::parse(Path::new("/p.toml"), &text).unwrap().exports;
        let [export] = &exports[..] else {
            panic!("{exports:?}")
        };
        assert_eq!(
            (export.max_size, export.max_backups, export.end),
            (10 << 20, 5, None)
        );
        assert!(export.field_mask.is_empty());
    }

    #[test]
    fn errors_of_an_export_have_their_places() {
        for (text, wanted) in [
            ("[[export]]\nfile = \"/f\"", "/p.toml:3:1: [[export]] needs name"),
            ("[[export]]\nname = \"a\"", "/p.toml:3:1: [[export]] needs file"),
            (
                "[[export]]\nname = \"a\"\nfile = \"f\"",
                "/p.toml:5:8: export.file must be the absolute path of a file",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/d/\"",
                "/p.toml:5:8: export.file must be the absolute path of a file",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/f\"\n[[export]]\nname = \"a\"\nfile = \"/g\"",
                "/p.toml:7:8: there is another export a",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/f\"\n[[export]]\nname = \"b\"\nfile = \"/f\"",
                "/p.toml:8:8: export a writes this file already",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/f\"\nfield_mask = [\"verdict\", \"pod\"]",
                "/p.toml:6:26: export.field_mask: a flow has no field 'pod'",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/f\"\nallow = ['{\"verdit\":[]}']",
                "/p.toml:6:10: export.allow: '{\"verdit\":[]}' is no filter (unknown field `verdit`",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/f\"\ndeny = ['{\"source_ip\":[\"x\"]}']",
                "/p.toml:6:9: export.deny: ",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/f\"\nmax_size = 0",
                "/p.toml:6:12: export.max_size must be between 1 and",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/f\"\nend = \"tomorrow\"",
                "/p.toml:6:7: export.end: 'tomorrow' is not an RFC 3339 time",
            ),
            (
                "[[export]]\nname = \"a\"\nfile = \"/f\"\nmask = []",
                "/p.toml:6:1: unknown key 'mask'",
            ),
        ] {
            let errors = errors(text);
            assert!(errors.contains(wanted), "{text}: {errors}");
        }
        let many: String = (0..17)
            .map(|n| format!("[[export]]\nname = \"e{n}\"\nfile = \"/f{n}\"\n"))
            .collect();
        assert!(errors(&many).contains("at most 16 exports"));
    }
}
