"""The virtual machine of scripts/lifecycle: its Debian root, its services, and a shell in it.

Both network cards are at one hub of qemu. eth0 is the NIC of the node; eth1 moves into the network namespace lan, which
stands for another machine of the network. The hub has no other port, so no packet leaves the machine.
"""

import base64
import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

REPO = pathlib.Path(__file__).resolve().parent.parent
WORK = REPO / "target/lifecycle"
PACKAGES = (
    "systemd,systemd-sysv,udev,dbus,openssh-server,openssh-client,nftables,iproute2,iputils-ping,procps,kmod,socat,"
    "initramfs-tools,openssl,linux-image-cloud-amd64,debsums,xz-utils,apparmor,podman,netavark,crun,iptables,busybox-static"
)
MIRROR = os.environ.get("PALISADE_DEBIAN_MIRROR", "http://deb.debian.org/debian")
# A check that waits for a state of the machine gives up after this time, s. Emulation on a busy machine is slow.
WAIT_LIMIT = 600
# Multiplies the time limits on the host; those inside the machine are in the time of its own clock.
SLOWNESS = float(os.environ.get("PALISADE_LIFECYCLE_SLOWNESS", "1"))

# Reads lines "ID BASE64" from the host, runs each as a command, and answers "ID EXIT-CODE BASE64".
AGENT = r"""#!/bin/bash
until [[ -e /dev/virtio-ports/lab.control ]]; do sleep 0.5; done
exec 3<>/dev/virtio-ports/lab.control
while read -r id command <&3; do
    output=$(timeout 550 bash -c "$(base64 -d <<<"$command")" 2>&1 </dev/null 3>&-)
    code=$?
    echo "$id $code $(base64 -w 0 <<<"$output")" >&3
done
"""

# lan: a peer of the node. It appears after network-pre.target, like the networks of any machine.
LAN = r"""#!/bin/bash
set -e
ip netns add lan
ip link set eth1 netns lan
ip -n lan addr add 10.9.0.2/24 dev eth1
ip -n lan addr add fd00:9::2/64 dev eth1 nodad
ip -n lan link set lo up
ip -n lan link set eth1 up
ip -n lan route add default via 10.9.0.1
sysctl -q -w net.ipv4.ip_forward=1
"""
# A workload: its network namespace, and servers that answer "open" at ports 80 and 81, what they get at port 82, and HTTP
# requests at port 83.
WORKLOAD = r"""#!/bin/bash
# lab-workload NAME NUMBER
set -e
ip netns add "$1"
ip link add "veth-$1" type veth peer name eth0 netns "$1"
ip addr add "10.8.$2.1/24" dev "veth-$1"
ip link set "veth-$1" up
ip -n "$1" addr add "10.8.$2.10/24" dev eth0
ip -n "$1" link set lo up
ip -n "$1" link set eth0 up
ip -n "$1" route add default via "10.8.$2.1"
for port in 80 81; do
    systemd-run -q -u "lab-$1-$port" ip netns exec "$1" socat "TCP-LISTEN:$port,fork,reuseaddr" SYSTEM:'echo open'
done
systemd-run -q -u "lab-$1-82" ip netns exec "$1" socat TCP-LISTEN:82,fork,reuseaddr EXEC:cat
systemd-run -q -u "lab-$1-83" ip netns exec "$1" socat TCP-LISTEN:83,fork,reuseaddr EXEC:/usr/local/sbin/lab-http-server
"""
# Answers each HTTP request of a connection.
HTTP_SERVER = r"""#!/bin/bash
while IFS= read -r line; do
    [[ $line != $'\r' ]] || printf 'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nopen\n'
done
"""
# Each second, a request and its response on one connection. Ends with the connection.
HTTP_CLIENT = r"""#!/bin/bash
exec 3<>/dev/tcp/10.8.0.10/83 || exit
while sleep 1; do
    printf 'GET /open HTTP/1.1\r\nHost: web\r\n\r\n' >&3 || exit
    line=
    until [[ $line == open ]]; do
        read -r line <&3 || exit
    done
    date +%s
done
"""

UNITS = {
    # Not bound to the device of the port: systemd waits for a device only 90 s, less than a slow machine needs.
    "lab-agent.service": (
        "[Unit]\nDefaultDependencies=no\nAfter=local-fs.target\nStartLimitIntervalSec=0\n"
        "[Service]\nExecStart=/usr/local/sbin/lab-agent\nRestart=always\nRestartSec=1\n[Install]\nWantedBy=sysinit.target\n"
    ),
    "lab-lan.service": (
        "[Unit]\nAfter=network-pre.target\nBefore=network.target\nWants=network-pre.target\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/local/sbin/lab-lan\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    "lab-workload.service": (
        "[Unit]\nAfter=network.target\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/local/sbin/lab-workload web 0\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    "lab-8080.service": (
        "[Unit]\nAfter=network.target\n[Service]\n"
        "ExecStart=/usr/bin/socat TCP6-LISTEN:8080,ipv6only=0,fork,reuseaddr SYSTEM:'echo open'\nRestart=always\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    # An ssh session of the peer. Each second, a line comes through it.
    "lab-ssh.service": (
        "[Service]\nExecStart=/usr/sbin/ip netns exec lan /usr/bin/ssh -o StrictHostKeyChecking=no -o ServerAliveInterval=5 "
        "10.9.0.1 'while sleep 1; do date +%%s; done'\nStandardOutput=file:/run/lab-ssh\nStandardError=append:/run/lab-ssh.log\n"
    ),
    # A connection of the peer to the workload. Each second, a line goes there and comes back.
    "lab-flow.service": (
        "[Service]\nExecStart=/bin/bash -c 'while sleep 1; do date +%%s; done | ip netns exec lan socat - TCP:10.8.0.10:82'\n"
        "StandardOutput=file:/run/lab-flow\nStandardError=append:/run/lab-flow.log\n"
    ),
    # An HTTP connection of the peer with the workload, which is inspected.
    "lab-http.service": (
        "[Service]\nExecStart=ip netns exec lan lab-http-client\n"
        "StandardOutput=file:/run/lab-http\nStandardError=append:/run/lab-http.log\n"
    ),
    # Tries denied ports all the time and notes each result.
    "lab-probe.service": (
        "[Service]\nExecStart=/bin/bash -c 'while true; do for to in 10.9.0.1:8080 [fd00:9::1]:8080 10.8.0.10:81; do "
        "timeout 1 ip netns exec lan socat -u TCP:$to - >>/run/lab-probe 2>/dev/null || echo denied >>/run/lab-probe; "
        "done; sleep 0.1; done'\n"
    ),
}
SCRIPTS = {
    "lab-agent": AGENT,
    "lab-lan": LAN,
    "lab-workload": WORKLOAD,
    "lab-http-server": HTTP_SERVER,
    "lab-http-client": HTTP_CLIENT,
}
ENABLED = ["lab-agent", "lab-lan", "lab-workload", "lab-8080", "systemd-networkd", "ssh", "podman.socket", "podman-restart"]
NIC = "[Match]\nName=eth0\n[Network]\nAddress=10.9.0.1/24\nAddress=fd00:9::1/64\n"


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, text=True, **options)


def output(*command):
    return run(*command, stdout=subprocess.PIPE).stdout


def build_root(root):
    """Makes the Debian root of the machine, without Palisade."""
    if not (root / "usr/bin/podman").exists():
        shutil.rmtree(root, ignore_errors=True)
        print("making a Debian root with debootstrap ...", flush=True)
        with open(WORK / "debootstrap.log", "w") as log:
            run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root, MIRROR, stdout=log)
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    # With it, packages start no service.
    (root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
    (root / "etc/fstab").write_text("/dev/vda / ext4 rw 0 1\n")
    (root / "etc/hostname").write_text("node1\n")
    (root / "etc/systemd/network/eth0.network").write_text(NIC)
    for name, text in UNITS.items():
        (root / "etc/systemd/system" / name).write_text(text)
    for name, text in SCRIPTS.items():
        (root / "usr/local/sbin" / name).write_text(text)
        (root / "usr/local/sbin" / name).chmod(0o755)
    run("chroot", root, "systemctl", "enable", *ENABLED, stderr=subprocess.DEVNULL)
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    if not (ssh / "id_ed25519").exists():
        run("chroot", root, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/.ssh/id_ed25519")
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")


def install_tools():
    """Installs the packages that the host lacks."""
    tools = {"debootstrap": "debootstrap", "qemu-system-x86_64": "qemu-system-x86", "mkfs.ext4": "e2fsprogs"}
    missing = [package for tool, package in tools.items() if not shutil.which(tool)]
    if missing:
        run("apt-get", "install", "-q", "-y", "--no-install-recommends", *missing, stdout=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def card(number):
    """Returns qemu's options for a network card at the hub."""
    return ["-netdev", f"hubport,id=nic{number},hubid=0",
            "-device", f"virtio-net-pci,netdev=nic{number},mac=52:54:00:09:00:0{number + 1}"]


class Machine:
    """The virtual machine, and its shell over a virtio port."""

    BOOT = "cat /proc/sys/kernel/random/boot_id"

    def __init__(self, image, root):
        kernel = max((root / "boot").glob("vmlinuz-*"))
        self.path = WORK / "control"
        self.path.unlink(missing_ok=True)
        self.monitor = WORK / "monitor"
        self.console = WORK / "console.log"
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "1536", "-smp", "1", "-display", "none"]
            # "stop" and "cont" at the monitor pause the machine with its clock.
            + ["-monitor", f"unix:{self.monitor},server=on,wait=off", "-nodefaults", "-serial", f"file:{self.console}", "-kernel", kernel]
            + ["-initrd", str(kernel).replace("vmlinuz", "initrd.img")]
            + ["-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet"]
            + ["-drive", f"file={image},if=virtio,format=raw,cache=unsafe", *card(0), *card(1)]
            + ["-device", "virtio-serial-pci", "-chardev", f"socket,path={self.path},server=on,wait=off,id=control"]
            + ["-device", "virtserialport,chardev=control,name=lab.control"],
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: os.nice(15),
        )
        self.socket = None
        self.buffer = b""
        self.serial = 0
        self.pauses = 0.0

    def close(self):
        self.process.kill()
        self.process.wait()

    def connect(self):
        for _ in range(600):
            self.socket = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                self.socket.connect(str(self.path))
                return
            time.sleep(0.1)
        sys.exit("lifecycle: qemu does not start")

    def now(self):
        """Returns the host's time without that in which the machine was paused, s."""
        return time.monotonic() - self.pauses

    def paused(self):
        """Returns whether the machine is paused."""
        text = b""
        with socket.socket(socket.AF_UNIX) as monitor, contextlib.suppress(OSError):
            monitor.settimeout(5)
            monitor.connect(str(self.monitor))
            monitor.sendall(b"info status\n")
            while b"\n" not in text.partition(b"VM status: ")[2]:
                data = monitor.recv(4096)
                if not data:
                    break
                text += data
        return b"VM status: paused" in text

    def shell(self, command, timeout=WAIT_LIMIT):
        """Returns exit code and output of a command."""
        self.serial += 1
        line = f"{self.serial} {base64.b64encode(command.encode()).decode()}\n"
        self.socket.sendall(line.encode())
        until = self.now() + timeout * SLOWNESS
        while True:
            while b"\n" in self.buffer:
                answer, self.buffer = self.buffer.split(b"\n", 1)
                words = answer.decode(errors="replace").split(" ")
                if words[0] == str(self.serial) and len(words) == 3:
                    return int(words[1]), base64.b64decode(words[2]).decode(errors="replace")
            left = until - self.now()
            if left <= 0:
                return 255, f"no answer to: {command}\n{self.console.read_text(errors='replace')[-2000:]}"
            step = time.monotonic()
            self.socket.settimeout(min(left, 5))
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                if self.paused():
                    self.pauses += time.monotonic() - step
                continue
            except ConnectionError:
                data = b""
            if not data:
                sys.exit("lifecycle: qemu has ended")
            self.buffer += data

    def boot(self, before=None):
        """Waits until the machine has booted, not as the boot `before`, and returns its state."""
        until = self.now() + WAIT_LIMIT * SLOWNESS
        while self.now() < until:
            # A port that no program has opened yet, or any more, answers nothing.
            code, boot = self.shell(self.BOOT, timeout=30)
            if code == 0 and boot != before:
                # Not by --wait, which misses the end of a boot that ends while it begins to wait.
                self.until("systemctl is-system-running | grep -q -v -e initializing -e starting")
                return self.shell("systemctl is-system-running")[1].strip()
        return "no answer"

    def holds(self, command):
        return self.shell(command)[0] == 0

    def done(self, command):
        """Returns whether a command succeeds, and its output."""
        code, text = self.shell(command)
        return code == 0, text

    def silent(self, command):
        """Returns whether a command prints nothing, and its output."""
        text = self.shell(command)[1]
        return not text.strip(), text

    def until(self, command, timeout=WAIT_LIMIT):
        """Returns whether a command succeeds within the time."""
        end = self.now() + timeout * SLOWNESS
        while self.now() < end:
            if self.holds(command):
                return True
            time.sleep(1)
        return False

    def write(self, path, text):
        encoded = base64.b64encode(text.encode()).decode()
        return self.shell(f"mkdir -p $(dirname {path}) && base64 -d <<<{encoded} >{path}")[0] == 0
