"""The programs that Packhorse is measured against, each run the way its users run it."""

import os
import pwd
import re
import subprocess
import time

from lab import Trouble, clean_env, end, folder, free_port, in_netns, run, scratch, start, timed, wait_for, wait_port


class RsyncDaemon:
    """A plain rsync daemon: neither encrypts nor checks what is on disk."""

    def __init__(self, name, source, address="127.0.0.1", netns=None, client_netns=None):
        self.port, self.address, self.client_netns = free_port(), address, client_netns
        config = scratch("rsyncd", f"{name}.conf")
        with open(config, "w") as f:
            f.write(f"use chroot = no\nlog file = {config}.log\npid file = {config}.pid\n")
            if os.geteuid() == 0:
                f.write("uid = root\ngid = root\n")
            f.write(f"[src]\npath = {source}\nread only = yes\n")
        argv = ["rsync", "--daemon", "--no-detach", f"--config={config}", f"--port={self.port}", f"--address={address}"]
        self.child = start(in_netns(netns, argv), f"{config}.out")
        if netns:
            time.sleep(0.5)
        else:
            wait_port(self.port, address, self.child)

    def pull(self, into, *options):
        """Copies the module into a folder; seconds, and the bytes that went over the line both ways."""
        argv = ["rsync", "-a", "--stats", *options, f"rsync://{self.address}:{self.port}/src/", f"{into}/"]
        took, out = timed(run, in_netns(self.client_netns, argv))
        return took, line_bytes(out)

    def close(self):
        end(self.child)


class RsyncSsh:
    """rsync over an sshd of our own, with a key of our own."""

    def __init__(self, source, address="127.0.0.1", netns=None, client_netns=None):
        self.source, self.address, self.client_netns, self.port = source, address, client_netns, free_port()
        where = folder("ssh", str(self.port))
        os.chmod(where, 0o700)
        for key in ("host", "user"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{where}/{key}"])
        with open(f"{where}/sshd_config", "w") as f:
            f.write(
                f"Port {self.port}\nListenAddress {address}\nHostKey {where}/host\nPidFile {where}/pid\n"
                f"AuthorizedKeysFile {where}/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
                "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            )
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        self.child = start(in_netns(netns, ["/usr/sbin/sshd", "-D", "-e", "-f", f"{where}/sshd_config"]), f"{where}/log")
        if netns:
            time.sleep(0.5)
        else:
            wait_port(self.port, address, self.child)
        user = pwd.getpwuid(os.geteuid()).pw_name
        self.shell = f"ssh -p {self.port} -l {user} -i {where}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -F none"

    def pull(self, into, *options):
        argv = ["rsync", "-a", "--stats", "-e", self.shell, *options, f"{self.address}:{self.source}/", f"{into}/"]
        took, out = timed(run, in_netns(self.client_netns, argv))
        return took, line_bytes(out)

    def close(self):
        end(self.child)


def line_bytes(stats):
    found = [re.search(rf"Total bytes {way}: ([\d,.]+)", stats) for way in ("sent", "received")]
    if not all(found):
        raise Trouble(f"rsync printed no statistics: {stats[-500:]}")
    return sum(int(re.sub(r"\D", "", m.group(1))) for m in found)


class Restic:
    """A local restic repository, with the compression that restic chooses by default."""

    def __init__(self, name):
        self.repo = scratch("restic", name)
        self.env = clean_env(RESTIC_PASSWORD="bench", RESTIC_REPOSITORY=self.repo, RESTIC_CACHE_DIR=scratch("restic", "cache", name))
        run(["restic", "init", "-q"], env=self.env)

    def backup(self, path):
        return timed(run, ["restic", "backup", "-q", path], env=self.env)[0]


class Registry:
    """Debian's docker-registry on a folder of its own, without a password."""

    def __init__(self, name):
        self.port = free_port()
        config = scratch("registry", f"{name}.yml")
        self.data = folder("registry", name)
        with open(config, "w") as f:
            f.write(
                "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\n"
                f"storage:\n  filesystem:\n    rootdirectory: {self.data}\n  delete:\n    enabled: true\n"
                f"http:\n  addr: 127.0.0.1:{self.port}\n  secret: bench\n"
            )
        env = clean_env(OTEL_TRACES_EXPORTER="none")
        self.child = start(["docker-registry", "serve", config], f"{config}.log", env=env)
        wait_port(self.port, child=self.child)

    def copy(self, layout, tag, into):
        """skopeo copies an image of an OCI layout to this registry; the seconds."""
        argv = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:{tag}", f"docker://127.0.0.1:{self.port}/{into}"]
        return timed(run, argv)[0]

    def digest(self, image):
        import hashlib

        raw = subprocess.run(["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://127.0.0.1:{self.port}/{image}"], capture_output=True)
        if raw.returncode != 0:
            raise Trouble(f"{image} is not in the registry: {raw.stderr.decode()[-300:]}")
        return "sha256:" + hashlib.sha256(raw.stdout).hexdigest()

    def close(self):
        end(self.child)


class Postgres:
    """A PostgreSQL cluster with default settings but for its port and socket."""

    def __init__(self, name):
        versions = sorted(os.listdir("/usr/lib/postgresql"), key=int)
        self.bin = f"/usr/lib/postgresql/{versions[-1]}/bin"
        self.port = free_port()
        self.where = folder("postgres", name)
        self.user = None
        if os.geteuid() == 0:
            self.user = pwd.getpwnam("postgres").pw_uid
            os.chown(self.where, self.user, pwd.getpwnam("postgres").pw_gid)
        run([f"{self.bin}/initdb", "-A", "trust", "-U", "packhorse", "-E", "UTF8", "--locale=C.UTF-8", "-D", f"{self.where}/data"], user=self.user, cwd="/")
        argv = [f"{self.bin}/postgres", "-D", f"{self.where}/data", "-p", str(self.port), "-k", self.where, "-h", "127.0.0.1"]
        self.child = start(argv, scratch("postgres", f"{name}.log"), user=self.user, cwd="/")
        ask = [f"{self.bin}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        wait_for("PostgreSQL accepts", lambda: subprocess.run(ask).returncode == 0)

    def url(self, db):
        return f"postgres://packhorse@127.0.0.1:{self.port}/{db}"

    def psql(self, db, *commands):
        argv = ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(self.port), "-U", "packhorse", "-d", db]
        for command in commands:
            argv += ["-c", command]
        return run(argv)

    def close(self):
        # SIGINT is PostgreSQL's fast shutdown.
        import signal

        end(self.child, signal.SIGINT)


PACKAGES = {
    "rsync": "rsync",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "restic": "restic",
    "skopeo": "skopeo",
    "docker-registry": "docker-registry",
    "psql": "postgresql",
    "ip": "iproute2",
    "gcc": "gcc",
    "zstd": "zstd",
    "diff": "diffutils",
}


def install():
    """Installs what is missing from Debian's packages, without starting what they bring."""
    import shutil

    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    os.environ["PATH"] = path
    missing = sorted({package for tool, package in PACKAGES.items() if not shutil.which(tool, path=path)})
    if not os.path.isdir("/usr/lib/postgresql"):
        missing.append("postgresql")
    if not missing:
        return
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    policy = "/usr/sbin/policy-rc.d"
    made = not os.path.exists(policy)
    if made:
        subprocess.run([*sudo, "tee", policy], input=b"#!/bin/sh\nexit 101\n", stdout=subprocess.DEVNULL, check=True)
        subprocess.run([*sudo, "chmod", "755", policy], check=True)
    try:
        subprocess.run([*sudo, "apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
        env = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive"]
        subprocess.run([*env, "apt-get", "install", "-q", "-y", "--no-install-recommends", *missing], check=True, stdout=subprocess.DEVNULL)
    finally:
        if made:
            subprocess.run([*sudo, "rm", "-f", policy])
