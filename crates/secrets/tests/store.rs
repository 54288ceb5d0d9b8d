//! The folder of secrets: layouts, permissions, chains, keys, and what a broken secret leaves in force.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests"
)]

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    sync::Arc,
};

use palisade_model::{
    rule::{HeaderMatch, HttpRule, MismatchAction, Policy, TlsContext},
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_policy::parse::parse;
use palisade_secrets::{Problem, SecretError, Store, Validity, check_policies, check_rule_set};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, Issuer, KeyPair, date_time_ymd,
};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file with mode 0600.
    fn write(&self, path: &str, content: &str) -> PathBuf {
        let path = self.dir().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        mode(&path, 0o600);
        path
    }

    fn load(&self, previous: Option<&Store>) -> (Store, Vec<Problem>) {
        Store::load(self.dir(), previous)
    }

    /// Loads a folder without problems.
    #[track_caller]
    fn good(&self) -> Store {
        let (store, problems) = self.load(None);
        assert!(problems.is_empty(), "{problems:?}");
        store
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn context(secret: &str) -> TlsContext {
    TlsContext {
        secret: secret.into(),
        ..TlsContext::default()
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec![format!("{name}.test"), "192.0.2.1".into()]).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = params(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Returns a certificate and its key, both PEM.
fn leaf(name: &str, issuer: &Issuer<'_, KeyPair>) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let certificate = params(name).signed_by(&key, issuer).unwrap();
    (certificate.pem(), key.serialize_pem())
}

fn yaml(name: &str, values: &[(&str, &str)]) -> String {
    let mut text =
        format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: shop}}\nstringData:\n");
    for (key, value) in values {
        text += &format!("  {key}: |\n");
        value.lines().for_each(|line| text += &format!("    {line}\n"));
    }
    text
}

#[test]
fn both_layouts_hold_the_same_secrets() {
    let folder = Folder::new();
    let ca = authority("ca");
    let (certificate, key) = leaf("web", &ca);
    let values = [
        ("tls.crt", certificate.as_str()),
        ("tls.key", &key),
        ("ca.crt", &ca.pem()),
    ];
    for (key, value) in values {
        folder.write(&format!("shop/web/{key}"), value);
    }
    folder.write("more.yaml", &yaml("other", &values));
    let store = folder.good();
    for name in ["shop/web", "shop/other"] {
        let identity = store.identity(&context(name)).unwrap();
        assert_eq!(identity.chain().len(), 1);
        let trust = store.trust(&context(name)).unwrap();
        assert_eq!(trust.certificates(), std::slice::from_ref(ca.der()));
        assert!(Arc::ptr_eq(trust.client().unwrap(), &identity));
    }
    assert!(matches!(
        store.identity(&context("shop/none")),
        Err(SecretError::Missing { .. })
    ));
}

#[test]
fn keys_have_other_names_if_the_policy_says_so() {
    let folder = Folder::new();
    let ca = authority("ca");
    let (certificate, key) = leaf("web", &ca);
    let values = [
        ("chain", certificate.as_str()),
        ("private", &key),
        ("roots", &ca.pem()),
    ];
    folder.write("a.yaml", &yaml("web", &values));
    let store = folder.good();
    let mut named = context("shop/web");
    assert_eq!(
        store.identity(&named).unwrap_err().to_string(),
        "secret shop/web has no key \"tls.crt\""
    );
    assert_eq!(
        store.trust(&named).unwrap_err().to_string(),
        "secret shop/web has no key \"ca.crt\""
    );
    named.trusted_ca = "roots".into();
    assert!(store.trust(&named).unwrap().client().is_none());
    (named.certificate, named.private_key) = ("chain".into(), "private".into());
    store.identity(&named).unwrap();
    assert!(store.trust(&named).unwrap().client().is_some());
    named.private_key = "none".into();
    assert!(matches!(store.trust(&named), Err(SecretError::NoKey { .. })));
}

#[test]
fn a_key_of_another_certificate_is_refused_with_file_and_line() {
    let folder = Folder::new();
    let ca = authority("ca");
    let (certificate, _) = leaf("web", &ca);
    let (_, key) = leaf("other", &ca);
    folder.write("shop/web/tls.crt", &certificate);
    let file = folder.write("shop/web/tls.key", &format!("comment\n{key}"));
    folder.write("shop/good/token", "x");
    let (store, problems) = folder.load(None);
    assert_eq!(
        problems[0].to_string(),
        format!(
            "{}:2: the private key does not fit the certificate",
            file.display()
        )
    );
    assert!(matches!(
        store.identity(&context("shop/web")),
        Err(SecretError::Broken(_))
    ));
    assert!(store.value("shop/good").is_some());
}

#[test]
fn the_order_of_a_chain_is_checked() {
    let folder = Folder::new();
    let root = authority("root");
    let mut between = params("between");
    between.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let between = CertifiedIssuer::signed_by(between, KeyPair::generate().unwrap(), &root).unwrap();
    let (certificate, key) = leaf("web", &between);
    let write = |chain: &[&str]| {
        folder.write("shop/web/tls.crt", &chain.concat());
        folder.load(None)
    };
    folder.write("shop/web/tls.key", &key);
    folder.write("shop/web/ca.crt", &root.pem());
    let (leaf, between, root) = (certificate.as_str(), &between.pem(), &root.pem());
    for chain in [&[leaf, between][..], &[leaf, between, root]] {
        let (store, problems) = write(chain);
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(
            store.identity(&context("shop/web")).unwrap().chain().len(),
            chain.len()
        );
    }
    for chain in [&[leaf, root, between], &[between, leaf, root]] {
        let (store, problems) = write(chain);
        assert!(
            problems[0]
                .text
                .contains("is not the issuer of the one before it"),
            "{problems:?}"
        );
        assert!(store.identity(&context("shop/web")).is_err());
    }
    // A chain without its intermediate certificate is used: clients may know the intermediate.
    let (store, problems) = write(&[leaf]);
    assert!(
        problems[0]
            .text
            .contains("an intermediate certificate is missing"),
        "{problems:?}"
    );
    assert!(!problems[0].is_error() && store.identity(&context("shop/web")).is_ok());
}

#[test]
fn an_expired_certificate_is_used_with_a_warning() {
    let folder = Folder::new();
    let ca = authority("ca");
    let key = KeyPair::generate().unwrap();
    let mut params = params("old");
    params.not_before = date_time_ymd(2001, 1, 1);
    params.not_after = date_time_ymd(2002, 1, 1);
    let certificate = params.signed_by(&key, &ca).unwrap();
    folder.write("shop/web/tls.crt", &certificate.pem());
    folder.write("shop/web/tls.key", &key.serialize_pem());
    let (store, problems) = folder.load(None);
    assert!(
        problems[0]
            .to_string()
            .contains("warning: the certificate of CN=old has expired"),
        "{problems:?}"
    );
    store.identity(&context("shop/web")).unwrap();
    let listed = store.certificates();
    assert_eq!(listed.len(), 1);
    let listed = &listed[0];
    assert_eq!(
        (
            listed.subject.as_str(),
            listed.issuer.as_str(),
            listed.is_ca,
            listed.line
        ),
        ("CN=old", "CN=ca", false, 1)
    );
    assert_eq!(listed.names, ["DNS:old.test", "IP:192.0.2.1"]);
    assert_eq!(
        (listed.not_before, listed.not_after),
        (978_307_200, 1_009_843_200)
    );
    assert_eq!(listed.validity(1_009_843_201), Validity::Expired);
    assert_eq!(listed.fingerprint.len(), 64);
}

#[test]
fn a_broken_secret_keeps_its_last_good_content_and_a_removed_one_is_gone() {
    let folder = Folder::new();
    let ca = authority("ca");
    let (certificate, key) = leaf("web", &ca);
    let file = folder.write("shop/web/tls.crt", &certificate);
    folder.write("shop/web/tls.key", &key);
    folder.write("a.yaml", &yaml("token", &[("value", "hello")]));
    folder.write("b.yaml", &yaml("gone", &[("value", "hello")]));
    let first = folder.good();
    let identity = first.identity(&context("shop/web")).unwrap();

    folder.write("shop/web/tls.crt", &certificate[..certificate.len() / 2]);
    folder.write("a.yaml", "kind: [");
    fs::remove_file(folder.dir().join("b.yaml")).unwrap();
    let (second, problems) = folder.load(Some(&first));
    assert_eq!(
        problems.iter().filter(|problem| problem.is_error()).count(),
        2,
        "{problems:?}"
    );
    assert!(
        problems
            .iter()
            .any(|problem| problem.file == file && problem.line == 1)
    );
    assert!(Arc::ptr_eq(
        &second.identity(&context("shop/web")).unwrap(),
        &identity
    ));
    assert_eq!(second.value("shop/token").unwrap().reveal(), b"hello");
    assert!(second.value("shop/gone").is_none());
    // The content survives several loads, and is gone once the secret is removed.
    let (third, _) = folder.load(Some(&second));
    assert!(third.is_same(&second) && third.identity(&context("shop/web")).is_ok());
    fs::remove_dir_all(folder.dir().join("shop")).unwrap();
    let (fourth, _) = folder.load(Some(&third));
    assert!(matches!(
        fourth.identity(&context("shop/web")),
        Err(SecretError::Missing { .. })
    ));
}

#[test]
fn an_unchanged_secret_stays_the_same_object_and_a_new_one_replaces_the_old() {
    let folder = Folder::new();
    let ca = authority("ca");
    for name in ["a", "b"] {
        let (certificate, key) = leaf(name, &ca);
        folder.write(&format!("shop/{name}/tls.crt"), &certificate);
        folder.write(&format!("shop/{name}/tls.key"), &key);
    }
    let first = folder.good();
    let (certificate, key) = leaf("b", &ca);
    folder.write("shop/b/tls.crt", &certificate);
    let (between, problems) = folder.load(Some(&first));
    // The new certificate with the old key: the old pair stays in use.
    assert!(problems[0].text.contains("does not fit"), "{problems:?}");
    let of = |store: &Store, name: &str| store.identity(&context(name)).unwrap();
    assert!(Arc::ptr_eq(&of(&first, "shop/b"), &of(&between, "shop/b")));
    folder.write("shop/b/tls.key", &key);
    let (second, problems) = folder.load(Some(&between));
    assert!(problems.is_empty(), "{problems:?}");
    assert!(Arc::ptr_eq(&of(&first, "shop/a"), &of(&second, "shop/a")));
    assert!(!Arc::ptr_eq(&of(&first, "shop/b"), &of(&second, "shop/b")));
}

#[test]
fn files_that_others_can_read_or_change_are_not_used() {
    let folder = Folder::new();
    let file = folder.write("shop/web/token", "hunter2");
    // All users can search the folders.
    for below in ["", "shop", "shop/web"] {
        mode(&folder.dir().join(below), 0o755);
    }
    let ca = authority("ca");
    let refused = |why: &str| {
        let (store, problems) = folder.load(None);
        assert!(store.value("shop/web").is_none(), "{why}");
        let text = problems.iter().map(ToString::to_string).collect::<String>();
        assert!(text.contains(why) && !text.contains("hunter2"), "{why}: {text}");
    };
    let accepted = || {
        let (store, problems) = folder.load(None);
        assert!(store.value("shop/web").is_some(), "{problems:?}");
    };
    accepted();
    mode(&file, 0o644);
    refused("all users can read this secret");
    // No other user can reach the file.
    mode(&folder.dir().join("shop"), 0o750);
    accepted();
    mode(&folder.dir().join("shop"), 0o755);
    mode(&file, 0o660);
    refused("other users can write it (mode 0660)");
    mode(&file, 0o640);
    accepted();
    for below in ["", "shop", "shop/web"] {
        mode(&folder.dir().join(below), 0o775);
        refused("chmod go-w");
        mode(&folder.dir().join(below), 0o755);
    }
    fs::write(&file, ca.pem()).unwrap();
    mode(&file, 0o644);
    accepted();
    fs::write(&file, ca.key().serialize_pem()).unwrap();
    refused("all users can read this secret");
    let yaml = folder.write("a.yaml", &yaml("yaml", &[("x", "y")]));
    mode(&yaml, 0o644);
    refused("a.yaml: all users can read this secret");
}

#[test]
fn files_of_another_user_are_not_used() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let folder = Folder::new();
    let file = folder.write("shop/web/token", "x");
    for path in [&file, &folder.dir().join("shop"), &folder.dir().to_owned()] {
        chown(path, Some(4711), None).unwrap();
        let (store, problems) = folder.load(None);
        assert!(store.value("shop/web").is_none());
        assert!(problems[0].text.contains("user 4711"), "{problems:?}");
        chown(path, Some(0), None).unwrap();
    }
    assert!(folder.good().value("shop/web").is_some());
}

#[test]
fn links_stay_inside_the_folder() {
    let folder = Folder::new();
    folder.write("shop/web/..2026/token", "x");
    symlink("..2026", folder.dir().join("shop/web/..data")).unwrap();
    symlink("..data/token", folder.dir().join("shop/web/token")).unwrap();
    assert_eq!(folder.good().value("shop/web").unwrap().reveal(), b"x");
    let outside = Folder::new();
    let target = outside.write("token", "x");
    fs::remove_file(folder.dir().join("shop/web/token")).unwrap();
    symlink(target, folder.dir().join("shop/web/token")).unwrap();
    let (store, problems) = folder.load(None);
    assert!(store.value("shop/web").is_none());
    assert!(problems[0].text.contains("outside of"), "{problems:?}");
}

#[test]
fn sizes_and_numbers_are_bounded() {
    let folder = Folder::new();
    folder.write("shop/large/token", &"x".repeat((1 << 20) + 1));
    for index in 0..65 {
        folder.write(&format!("shop/many/k{index}"), "x");
    }
    let fifo = |path: &str| {
        let path = folder.dir().join(path);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    };
    fifo("pipe.yaml");
    fs::create_dir(folder.dir().join("shop/fifo")).unwrap();
    fifo("shop/fifo/token");
    let (store, problems) = folder.load(None);
    assert_eq!(store.names().count(), 0);
    let text = problems.iter().map(ToString::to_string).collect::<String>();
    for part in [
        "larger than 1 MiB",
        "more than 64 values",
        "pipe.yaml: not a regular file",
        "token: not a regular file",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn the_value_for_a_header_ends_before_the_end_of_its_line() {
    let folder = Folder::new();
    folder.write("shop/token/value", "Bearer x\r\n");
    folder.write("shop/two/a", "x");
    folder.write("shop/two/b", "x");
    let store = folder.good();
    assert_eq!(store.value("shop/token").unwrap().reveal(), b"Bearer x");
    assert!(store.value("shop/two").is_none());
    let error = store.value_error("shop/two").unwrap().to_string();
    assert!(error.contains("must have exactly one value"), "{error}");
    assert!(store.value_error("shop/token").is_none());
    assert!(matches!(
        store.value_error("shop/none"),
        Some(SecretError::Missing { .. })
    ));
}

#[test]
fn a_secret_is_in_one_place() {
    let folder = Folder::new();
    folder.write("b.yaml", &yaml("token", &[("value", "b")]));
    let first = folder.good();
    folder.write("a.yaml", &yaml("token", &[("value", "a")]));
    let (second, problems) = folder.load(Some(&first));
    assert_eq!(second.value("shop/token").unwrap().reveal(), b"b");
    assert!(
        problems[0]
            .to_string()
            .contains("a.yaml: warning: secret shop/token is also in"),
        "{problems:?}"
    );
    let (fresh, _) = folder.load(None);
    assert_eq!(fresh.value("shop/token").unwrap().reveal(), b"a");
}

/// Returns the policy of an entry with the given members beside its ports.
fn policies(members: &str) -> Vec<Policy> {
    let text = format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: p, namespace: shop}}\nspec:\n  \
         endpointSelector: {{}}\n  egress:\n  - toPorts:\n    - ports: [{{port: '443', protocol: TCP}}]\n      {members}\n"
    );
    let parsed = parse("p.yaml", &text);
    assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
    parsed.policies
}

#[test]
fn secrets_of_policies_are_checked_at_the_place_of_the_entry() {
    let folder = Folder::new();
    let ca = authority("ca");
    let (certificate, key) = leaf("web", &ca);
    folder.write("shop/web/tls.crt", &certificate);
    folder.write("shop/web/tls.key", &key);
    folder.write("shop/roots/ca.crt", &ca.pem());
    folder.write("shop/token/value", "x");
    folder.write("shop/lines/value", "x\nX-B: y");
    folder.write("infra/ca/tls.crt", &ca.pem());
    folder.write("infra/ca/tls.key", &ca.key().serialize_pem());
    let store = folder.good();
    let found = |members: &str, interception_ca| {
        let found = check_policies(&policies(members), &store, interception_ca);
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let none: [&str; 0] = [];
    assert_eq!(
        found(
            "terminatingTLS: {secret: {name: web}}\n      originatingTLS: {secret: {name: roots}}",
            None
        ),
        none
    );
    let terminating = |secret: &str| format!("terminatingTLS: {{secret: {secret}}}");
    assert_eq!(
        found(&terminating("{name: roots}"), None),
        [
            "p.yaml:8:7: terminatingTLS: secret shop/roots has no key \"tls.crt\"; the traffic that needs it is denied"
        ]
    );
    assert!(found("originatingTLS: {secret: {name: web}}", None)[0].contains("has no key \"ca.crt\""));
    assert_eq!(
        found(&terminating("{namespace: infra, name: ca}"), Some("infra/ca")),
        none
    );
    assert!(
        found(&terminating("{name: web}"), Some("shop/web"))[0].contains("cannot be the interception CA")
    );
    let header = |members: &str| format!("rules: {{http: [{{headerMatches: [{{name: X-A, {members}}}]}}]}}");
    assert_eq!(found(&header("secret: {name: token}"), None), none);
    assert_eq!(found(&header("secret: {name: none}, value: x"), None), none);
    assert!(
        found(&header("secret: {name: none}"), None)[0]
            .contains("headerMatches: secret shop/none is missing")
    );
    assert!(found(&header("secret: {name: web}"), None)[0].contains("exactly one value"));
    assert!(found(&header("secret: {name: lines}, value: x"), None)[0].contains("cannot be in a header"));
}

#[test]
fn secrets_of_rule_sets_are_checked_as_those_of_policies() {
    let folder = Folder::new();
    folder.write("shop/token/value", "x");
    let store = folder.good();
    let rule = |secret: &str| Alternative {
        rule: 1,
        matcher: Matcher::Http(HttpRule {
            header_matches: vec![HeaderMatch {
                name: "X-A".into(),
                value: None,
                secret: Some(secret.into()),
                mismatch: MismatchAction::Add,
            }],
            ..HttpRule::default()
        }),
    };
    let mut set = RuleSet {
        alternatives: vec![rule("shop/token")],
        ..RuleSet::default()
    };
    assert_eq!(check_rule_set(&set, &store, None), [""; 0]);
    set.terminating_tls = Some(context("shop/web"));
    set.originating_tls = Some(context("shop/roots"));
    set.alternatives.extend([rule("shop/none"), rule("shop/none")]);
    let found = check_rule_set(&set, &store, Some("shop/web"));
    for (found, wanted) in found.iter().zip([
        "terminatingTLS: secret shop/web is missing",
        "originatingTLS: secret shop/roots is missing",
        "headerMatches: secret shop/none is missing",
    ]) {
        assert!(
            found.starts_with(wanted) && found.ends_with("; the traffic that needs it is denied"),
            "{found}"
        );
    }
    assert_eq!(found.len(), 3);
}

#[test]
fn a_missing_folder_has_no_secrets() {
    let folder = Folder::new();
    let (store, problems) = Store::load(&folder.dir().join("none"), None);
    assert!(problems.is_empty() && store.names().next().is_none());
}

#[test]
fn debug_prints_no_content() {
    let folder = Folder::new();
    let ca = authority("ca");
    let (certificate, key) = leaf("web", &ca);
    folder.write("shop/web/tls.crt", &certificate);
    folder.write("shop/web/tls.key", &key);
    let store = folder.good();
    let identity = store.identity(&context("shop/web")).unwrap();
    assert_eq!(
        format!("{store:?} {identity:?}"),
        "Store { secrets: [\"shop/web\"], .. } Identity { certificates: 1, .. }"
    );
}
