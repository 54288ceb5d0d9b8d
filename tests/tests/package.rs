//! The Debian package and the tarball, made with the binary of this build, without lintian. `scripts/lifecycle` installs the
//! package in a machine.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::Command,
};

const REPO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The package, unpacked.
struct Package {
    dir: tempfile::TempDir,
    deb: String,
}

fn output(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn the_package_and_the_tarball_are_complete_and_usable() {
    if Command::new("dpkg-shlibdeps").arg("--version").output().is_err() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    output(Command::new(format!("{REPO}/scripts/package")).args([
        "--quick",
        "--binary",
        &format!("{REPO}/target/debug/palisade"),
        "--output",
        dir.path().to_str().expect("text"),
    ]));
    let deb = fs::read_dir(dir.path())
        .expect("the folder")
        .filter_map(|entry| entry.expect("an entry").path().to_str().map(str::to_owned))
        .find(|path| path.ends_with(".deb"))
        .expect("a package");
    output(
        Command::new("dpkg-deb")
            .args(["--raw-extract", &deb])
            .arg(dir.path().join("root")),
    );
    let package = Package { dir, deb };
    the_files_are_complete_and_belong_to_root(&package);
    the_shipped_configuration_guards_nothing_and_its_example_denies_nothing(&package);
    bash_completes_commands_and_values_of_options(&package);
    the_maintainer_scripts_are_valid(&package);
    the_checksums_and_the_bill_of_materials_hold(&package);
}

impl Package {
    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("root")
    }

    fn palisade(&self) -> Command {
        Command::new(self.root().join("usr/bin/palisade"))
    }
}

fn the_files_are_complete_and_belong_to_root(package: &Package) {
    let list = output(Command::new("dpkg-deb").args(["--contents", &package.deb]));
    for path in [
        "/usr/bin/palisade",
        "/usr/lib/systemd/system/palisade.service",
        "/etc/palisade/palisade.toml",
        "/etc/palisade/policies.d/example.yaml",
        "/usr/share/man/man8/palisade.8.gz",
        "/usr/share/man/man8/palisade-policy-validate.8.gz",
        "/usr/share/man/man5/palisade.toml.5.gz",
        "/usr/share/man/man7/policies.7.gz",
        "/usr/share/bash-completion/completions/palisade",
        "/usr/share/zsh/vendor-completions/_palisade",
        "/usr/share/fish/vendor_completions.d/palisade.fish",
        "/usr/share/palisade/prometheus/palisade.rules.yml",
        "/usr/share/palisade/grafana/palisade.json",
        "/usr/share/doc/palisade/README.md",
        "/usr/share/doc/palisade/docs/INSTALL.md",
        "/usr/share/doc/palisade/copyright",
        "/usr/share/doc/palisade/changelog.gz",
        "/usr/share/doc/palisade/changelog.Debian.gz",
        "/usr/share/doc/palisade/palisade.cdx.json.gz",
        "/usr/share/doc/palisade/THIRD-PARTY.gz",
    ] {
        assert!(list.contains(&format!(" .{path}\n")), "{path}\n{list}");
    }
    for line in list.lines() {
        assert!(line.contains(" root/root "), "{line}");
        let group_or_others_may_write = line.as_bytes()[5] == b'w' || line.as_bytes()[8] == b'w';
        assert!(line.starts_with('l') || !group_or_others_may_write, "{line}");
    }
    let conffiles = fs::read_to_string(package.root().join("DEBIAN/conffiles")).expect("conffiles");
    assert_eq!(
        conffiles,
        "/etc/palisade/palisade.toml\n/etc/palisade/policies.d/example.yaml\n"
    );
    let copyright =
        fs::read_to_string(package.root().join("usr/share/doc/palisade/copyright")).expect("text");
    assert!(
        !copyright.contains('@') && copyright.contains("  ISC: "),
        "{copyright}"
    );
}

fn the_shipped_configuration_guards_nothing_and_its_example_denies_nothing(package: &Package) {
    let config = package.root().join("etc/palisade/palisade.toml");
    let text = output(
        package
            .palisade()
            .args(["run", "--check-config", "--config"])
            .arg(&config),
    );
    assert!(text.contains("valid: 0 interfaces, 0 endpoints"), "{text}");
    let policies = package.root().join("etc/palisade/policies.d");
    let text = output(package.palisade().args(["policy", "validate"]).arg(policies));
    assert!(text.contains("0 policies"), "{text}");
    // The example in comments is valid once it is uncommented.
    let example =
        fs::read_to_string(package.root().join("etc/palisade/policies.d/example.yaml")).expect("text");
    let start = example.find("# apiVersion").expect("a policy");
    let policy: String = example[start..]
        .lines()
        .map(|line| {
            line.trim_start_matches('#')
                .strip_prefix(' ')
                .unwrap_or_default()
                .to_owned()
                + "\n"
        })
        .collect();
    let file = package.dir.path().join("uncommented.yaml");
    fs::write(&file, policy).expect("a file");
    let text = output(package.palisade().args(["policy", "validate"]).arg(file));
    assert!(
        text.contains("1 policy") && text.contains("0 errors, 0 warnings"),
        "{text}"
    );
}

fn bash_completes_commands_and_values_of_options(package: &Package) {
    let complete = |words: &str| {
        let script = package
            .root()
            .join("usr/share/bash-completion/completions/palisade");
        let words: Vec<&str> = words.split(' ').collect();
        output(
            Command::new("bash")
                .arg("-c")
                .arg(
                    "script=$1; shift; source \"$script\"; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); \
                     _palisade palisade \"${COMP_WORDS[-1]}\" \"${COMP_WORDS[-2]}\"; printf '%s\\n' \"${COMPREPLY[@]}\"",
                )
                .arg("bash")
                .arg(script)
                .args(words),
        )
    };
    assert_eq!(complete("palisade stat").trim(), "status");
    assert_eq!(complete("palisade policy val").trim(), "validate");
    let formats = complete("palisade policy get --output ");
    assert!(formats.contains("json") && formats.contains("yaml"), "{formats}");
}

fn the_maintainer_scripts_are_valid(package: &Package) {
    for name in ["preinst", "postinst", "prerm", "postrm"] {
        let script = package.root().join("DEBIAN").join(name);
        output(Command::new("sh").arg("-n").arg(&script));
        let text = fs::read_to_string(&script).expect("text");
        assert!(text.contains("\nset -e\n"), "{name}");
    }
    let prerm = fs::read_to_string(package.root().join("DEBIAN/prerm")).expect("text");
    assert!(
        prerm.contains("ischroot") && prerm.contains("palisade stop --detach"),
        "{prerm}"
    );
}

/// A machine with systemd as the maintainer scripts see it: commands that note how they are called, and the folders that the
/// scripts use, below a folder.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    /// `active`: whether systemd says that the daemon runs. `restart`: what `palisade restart` does, in shell.
    fn new(active: bool, restart: &str) -> Self {
        let machine = Self {
            dir: tempfile::tempdir().expect("a folder"),
        };
        for folder in [
            "bin",
            "usr/bin",
            "usr/sbin",
            "usr/lib/systemd/system",
            "run/systemd/system",
            "run/palisade",
            "proc/7",
        ] {
            fs::create_dir_all(machine.path(folder)).expect("a folder");
        }
        machine.write("usr/lib/systemd/system/palisade.service", "before");
        machine.program("before");
        let active = if active { "true" } else { "false" };
        for (name, action) in [
            (
                "systemctl",
                format!("case $1 in is-active) {active} ;; show) echo 7 ;; esac").as_str(),
            ),
            ("deb-systemd-helper", ":"),
            ("deb-systemd-invoke", ":"),
            ("palisade", restart),
        ] {
            machine.command(&format!("bin/{name}"), action);
        }
        machine
    }

    fn path(&self, path: &str) -> std::path::PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        fs::write(self.path(path), text).expect("a file");
    }

    fn command(&self, path: &str, action: &str) {
        let name = Path::new(path)
            .file_name()
            .expect("a name")
            .to_str()
            .expect("text");
        let calls = self.path("calls");
        let root = self.dir.path().display();
        self.write(
            path,
            &format!(
                "#!/bin/sh\necho {name} \"$@\" >>{}\ncd {root}\n{action}\n",
                calls.display()
            ),
        );
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(0o755)).expect("mode");
    }

    /// The daemon's process, 7, executes this program.
    fn program(&self, program: &str) {
        let link = self.path("proc/7/exe");
        let _ = fs::remove_file(&link);
        symlink(self.path("usr/bin").join(program), link).expect("a link");
    }

    fn run(&self, script: &str, arguments: &[&str]) {
        let mut text = fs::read_to_string(format!("{REPO}/packaging/debian/{script}")).expect("a script");
        let root = self.dir.path().display();
        for folder in ["/usr/", "/run/", "/proc/"] {
            for before in [" ", "=", "\""] {
                text = text.replace(&format!("{before}{folder}"), &format!("{before}{root}{folder}"));
            }
        }
        self.write(script, &text);
        let path = format!(
            "{}:{}",
            self.path("bin").display(),
            std::env::var("PATH").expect("PATH")
        );
        output(
            Command::new("sh")
                .arg(self.path(script))
                .args(arguments)
                .env("PATH", path),
        );
    }

    /// Upgrades the package, and returns the calls that restart the daemon.
    fn upgrade(&self, unit: &str) -> Vec<String> {
        self.run("preinst", &["upgrade", "0.1.0-1", "0.1.0-2"]);
        self.write("usr/lib/systemd/system/palisade.service", unit);
        self.run("postinst", &["configure", "0.1.0-1"]);
        assert!(!self.path("run/palisade/unit-before").exists());
        let calls = fs::read_to_string(self.path("calls")).expect("calls");
        calls
            .lines()
            .filter(|call| call.starts_with("palisade ") || call.starts_with("deb-systemd-invoke "))
            .map(str::to_owned)
            .collect()
    }
}

const IN_PLACE: &str = "palisade restart --force";
const SERVICE: &str = "deb-systemd-invoke restart palisade.service";
/// `palisade restart`: the process executes the new program.
const EXECUTES: &str = "rm proc/7/exe; ln -s $PWD/usr/bin/palisade proc/7/exe";

#[test]
fn an_upgrade_has_the_daemon_execute_the_new_program_in_place() {
    assert_eq!(Machine::new(true, EXECUTES).upgrade("before"), [IN_PLACE]);
    // It runs, but could not take the connections over.
    let cut = format!("{EXECUTES}; exit 1");
    assert_eq!(Machine::new(true, &cut).upgrade("before"), [IN_PLACE]);
    // A daemon that was stopped stays stopped.
    assert!(Machine::new(false, EXECUTES).upgrade("before").is_empty());
}

#[test]
fn an_upgrade_restarts_the_service_where_the_daemon_cannot_execute_the_new_program() {
    // It refuses, or executes another program than the installed one.
    for restart in ["exit 1", "exit 3", "exit 0"] {
        assert_eq!(Machine::new(true, restart).upgrade("before"), [IN_PLACE, SERVICE]);
    }
    // Only systemd can apply what has changed in the unit.
    assert_eq!(Machine::new(true, EXECUTES).upgrade("after"), [SERVICE]);
    // The version before had no copy made of its unit.
    let machine = Machine::new(true, EXECUTES);
    fs::remove_dir(machine.path("run/palisade")).expect("the folder");
    assert_eq!(machine.upgrade("before"), [SERVICE]);
}

#[test]
fn an_upgrade_asks_the_administrator_s_policy_of_services() {
    for (code, calls) in [(0, [IN_PLACE]), (104, [IN_PLACE]), (101, [SERVICE])] {
        let machine = Machine::new(true, EXECUTES);
        machine.command("usr/sbin/policy-rc.d", &format!("exit {code}"));
        assert_eq!(machine.upgrade("before"), calls, "{code}");
    }
}

#[test]
fn the_unit_is_as_restricted_as_the_documents_say() {
    let unit = format!("{REPO}/config/palisade.service");
    // systemd need not be installed. Versions before 252 cannot assess a file.
    let Ok(assessed) = Command::new("systemd-analyze")
        .args([
            "security",
            "--offline=true",
            "--threshold=30",
            "--no-pager",
            &unit,
        ])
        .output()
    else {
        return;
    };
    let text = String::from_utf8_lossy(&assessed.stdout);
    if text.contains("Overall exposure level") {
        assert!(assessed.status.success(), "{text}");
    }
}

fn the_checksums_and_the_bill_of_materials_hold(package: &Package) {
    output(
        Command::new("sha256sum")
            .args(["--check", "--strict", "SHA256SUMS"])
            .current_dir(package.dir.path()),
    );
    let sums = fs::read_to_string(package.dir.path().join("SHA256SUMS")).expect("sums");
    assert_eq!(sums.lines().count(), 3, "{sums}");
    let bom = fs::read_dir(package.dir.path())
        .expect("the folder")
        .map(|entry| entry.expect("an entry").path())
        .find(|path: &std::path::PathBuf| path.to_string_lossy().ends_with(".cdx.json"))
        .expect("a bill of materials");
    let bom: serde_json::Value = serde_json::from_str(&fs::read_to_string(bom).expect("text")).expect("JSON");
    let components = bom["components"].as_array().expect("components");
    let names: Vec<&str> = components.iter().filter_map(|one| one["name"].as_str()).collect();
    assert!(
        names.contains(&"rustls") && names.contains(&"palisade-xdp"),
        "{names:?}"
    );
    assert!(
        !names.contains(&"proptest") && !names.contains(&"palisade-testbed"),
        "{names:?}"
    );
}
