//! A container's configuration and its image become an OCI runtime specification.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use linux::mount::RootDirectory;
use serde_json::{Value, json};

use crate::image::Image;
use crate::types::{ContainerConfig, Mount, Resources, RuntimeError, SandboxConfig, Security};

/// What docker and containerd give a container that asks for nothing.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];
/// In the kernel's numbering.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
const MASKED_PATHS: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the specification needs besides the container's own wishes.
pub struct Surroundings<'a> {
    pub sandbox: &'a SandboxConfig,
    pub sandbox_directory: &'a Path,
    pub image: &'a Image,
    pub user: User,
    pub cgroup: &'a Path,
    /// Process 1 of the pod's shared process namespace.
    pub pod_init: Option<i32>,
    /// The bits of /proc/self/status that say what we may give at most.
    pub own_capabilities: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

pub fn oci_spec(config: &ContainerConfig, around: &Surroundings<'_>) -> Result<Value, RuntimeError> {
    let security = &config.security;
    let mut namespaces = vec![json!({"type": "mount"})];
    // Network, IPC and UTS namespaces are the helper's own, which its children simply keep.
    match around.pod_init {
        Some(pid) => namespaces.push(json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")})),
        None if around.sandbox.host_pid => {}
        None => namespaces.push(json!({"type": "pid"})),
    }
    let unmasked = security.privileged || security.unmasked_proc;
    let masked: &[&str] = if unmasked { &[] } else { &MASKED_PATHS };
    let readonly: &[&str] = if unmasked { &[] } else { &READONLY_PATHS };
    let propagation = config.mounts.iter().any(|m| m.follow_host_mounts).then_some("rslave");
    let mut linux = json!({
        "namespaces": namespaces,
        "cgroupsPath": around.cgroup,
        "resources": resources(&config.resources, security.privileged),
        "maskedPaths": masked,
        "readonlyPaths": readonly,
    });
    if let Some(propagation) = propagation {
        linux["rootfsPropagation"] = json!(propagation);
    }
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": process(config, around)?,
        "root": {"path": "rootfs", "readonly": security.readonly_rootfs},
        "mounts": mounts(config, around),
        "linux": linux,
    }))
}

/// The process of a container; `exec` takes the same with other arguments.
pub fn process(config: &ContainerConfig, around: &Surroundings<'_>) -> Result<Value, RuntimeError> {
    let image = &around.image.config;
    let mut arguments = if config.command.is_empty() { image.entrypoint.clone() } else { config.command.clone() };
    if !config.args.is_empty() {
        arguments.extend(config.args.iter().cloned());
    } else if config.command.is_empty() {
        arguments.extend(image.cmd.iter().cloned());
    }
    if arguments.is_empty() {
        return Err(RuntimeError::InvalidConfig(format!(
            "no command specified: image {} has none either",
            config.image
        )));
    }
    let directory = config
        .working_dir
        .clone()
        .filter(|d| !d.is_empty())
        .or_else(|| Some(image.working_dir.clone()).filter(|d| !d.is_empty()))
        .unwrap_or_else(|| "/".to_owned());
    let capabilities = capabilities(&config.security, around.own_capabilities)?;
    Ok(json!({
        "terminal": config.tty,
        "user": {"uid": around.user.uid, "gid": around.user.gid, "additionalGids": around.user.groups},
        "args": arguments,
        "env": environment(config, around),
        "cwd": directory,
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            "inheritable": [], "ambient": [],
        },
        "noNewPrivileges": config.security.no_new_privileges,
    }))
}

fn environment(config: &ContainerConfig, around: &Surroundings<'_>) -> Vec<String> {
    let mut variables: Vec<String> = around.image.config.env.clone();
    let mut set = |variable: String| {
        let name = variable.split('=').next().unwrap_or_default().to_owned() + "=";
        match variables.iter_mut().find(|v| v.starts_with(&name)) {
            Some(existing) => *existing = variable,
            None => variables.push(variable),
        }
    };
    set(format!("HOSTNAME={}", around.sandbox.hostname));
    if config.tty {
        set("TERM=xterm".to_owned());
    }
    for (name, value) in &config.env {
        set(format!("{name}={value}"));
    }
    if !variables.iter().any(|v| v.starts_with("PATH=")) {
        variables.push(DEFAULT_PATH.to_owned());
    }
    variables
}

fn capabilities(security: &Security, own: u64) -> Result<Vec<String>, RuntimeError> {
    let mut names: BTreeSet<&str> = DEFAULT_CAPABILITIES.into_iter().collect();
    if security.privileged {
        names = CAPABILITIES.into_iter().collect();
    } else {
        let known = |name: &String| -> Result<&'static str, RuntimeError> {
            let bare = name.to_ascii_uppercase();
            let bare = bare.strip_prefix("CAP_").unwrap_or(&bare);
            CAPABILITIES
                .into_iter()
                .find(|c| *c == bare)
                .ok_or_else(|| RuntimeError::InvalidConfig(format!("unknown capability {name:?}: see capabilities(7)")))
        };
        let is_all = |name: &String| name.eq_ignore_ascii_case("all");
        if security.add_capabilities.iter().any(is_all) {
            names = CAPABILITIES.into_iter().collect();
        }
        if security.drop_capabilities.iter().any(is_all) {
            names.clear();
        }
        for name in security.add_capabilities.iter().filter(|n| !is_all(n)) {
            names.insert(known(name)?);
        }
        for name in security.drop_capabilities.iter().filter(|n| !is_all(n)) {
            names.remove(known(name)?);
        }
    }
    // Nobody can give what he does not have.
    Ok(CAPABILITIES
        .iter()
        .enumerate()
        .filter(|(bit, name)| own & (1 << bit) != 0 && names.contains(*name))
        .map(|(_, name)| format!("CAP_{name}"))
        .collect())
}

fn resources(wanted: &Resources, privileged: bool) -> Value {
    let mut cpu = json!({});
    if let Some(shares) = wanted.cpu_shares {
        cpu["shares"] = json!(shares);
    }
    if let Some(quota) = wanted.cpu_quota {
        cpu["quota"] = json!(quota);
        cpu["period"] = json!(wanted.cpu_period.unwrap_or(100_000));
    }
    let mut all = json!({
        "cpu": cpu,
        "devices": [{"allow": privileged, "access": "rwm"}],
    });
    if let Some(limit) = wanted.memory_limit {
        all["memory"] = json!({"limit": limit});
    }
    if let Some(limit) = wanted.pids_limit {
        all["pids"] = json!({"limit": limit});
    }
    all
}

fn mounts(config: &ContainerConfig, around: &Surroundings<'_>) -> Vec<Value> {
    let access = if config.security.privileged { "rw" } else { "ro" };
    let bind = |mount: &Mount| {
        let propagation = if mount.follow_host_mounts { "rslave" } else { "rprivate" };
        let access = if mount.readonly { "ro" } else { "rw" };
        json!({
            "destination": mount.container_path, "type": "bind", "source": mount.host_path,
            "options": ["rbind", propagation, access],
        })
    };
    let shared = |path: &str, name: &str, readonly: bool| {
        bind(&Mount {
            container_path: path.to_owned(),
            host_path: around.sandbox_directory.join(name),
            readonly,
            follow_host_mounts: false,
        })
    };
    let mut all = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
               "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
               "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
               "options": ["nosuid", "noexec", "nodev", access]}),
        shared("/dev/shm", "shm", false),
        shared("/etc/resolv.conf", "resolv.conf", config.security.readonly_rootfs),
        shared("/etc/hostname", "hostname", config.security.readonly_rootfs),
    ];
    let clean = |path: &str| Path::new("/").join(Path::new(path)).components().collect::<PathBuf>();
    for mount in &config.mounts {
        let destination = clean(&mount.container_path);
        all.retain(|m| m["destination"].as_str().is_none_or(|d| Path::new(d) != destination));
    }
    // A mount must not hide one that was made below it before.
    let mut own: Vec<&Mount> = config.mounts.iter().collect();
    own.sort_by_key(|m| clean(&m.container_path).components().count());
    all.extend(own.into_iter().map(bind));
    all
}

/// Who the container runs as: the pod's wish, else the image's USER, with names looked up in the image.
pub fn resolve_user(security: &Security, image_user: &str, layers: &[PathBuf]) -> Result<User, RuntimeError> {
    let number = |what: &str, n: i64| {
        u32::try_from(n).map_err(|_| RuntimeError::InvalidConfig(format!("{what} {n} is out of range")))
    };
    let (name, group) = image_user.split_once(':').unwrap_or((image_user, ""));
    let passwd = read_from_layers(layers, "etc/passwd");
    let mut user = User::default();
    let mut name_of_user = None;
    match security.run_as_user {
        Some(uid) => user.uid = number("runAsUser", uid)?,
        None if name.is_empty() => {}
        None => match name.parse() {
            Ok(uid) => user.uid = uid,
            Err(_) => {
                let row = passwd.lines().map(fields).find(|row| row.first() == Some(&name)).ok_or_else(|| {
                    RuntimeError::InvalidConfig(format!("unable to find user {name}: no matching entry in passwd file"))
                })?;
                user.uid = row.get(2).and_then(|f| f.parse().ok()).unwrap_or(0);
            }
        },
    }
    let id = user.uid.to_string();
    if let Some(row) = passwd.lines().map(fields).find(|row| row.get(2) == Some(&id.as_str())) {
        user.gid = row.get(3).and_then(|f| f.parse().ok()).unwrap_or(0);
        name_of_user = row.first().map(|n| (*n).to_owned());
    }
    let groups = read_from_layers(layers, "etc/group");
    if let Some(gid) = security.run_as_group {
        user.gid = number("runAsGroup", gid)?;
    } else if security.run_as_user.is_none() && !group.is_empty() {
        user.gid = match group.parse() {
            Ok(gid) => gid,
            Err(_) => groups
                .lines()
                .map(fields)
                .find(|row| row.first() == Some(&group))
                .and_then(|row| row.get(2)?.parse().ok())
                .ok_or_else(|| {
                    RuntimeError::InvalidConfig(format!(
                        "unable to find group {group}: no matching entry in group file"
                    ))
                })?,
        };
    }
    let mut additional = BTreeSet::new();
    for gid in &security.supplemental_groups {
        additional.insert(number("a supplemental group", *gid)?);
    }
    if let Some(name) = name_of_user {
        for row in groups.lines().map(fields) {
            if row.get(3).is_some_and(|members| members.split(',').any(|m| m == name)) {
                additional.extend(row.get(2).and_then(|f| f.parse::<u32>().ok()));
            }
        }
    }
    user.groups = additional.into_iter().collect();
    Ok(user)
}

fn fields(line: &str) -> Vec<&str> {
    line.split(':').collect()
}

/// The file as the topmost layer that has it shows it; empty when none has.
fn read_from_layers(layers: &[PathBuf], path: &str) -> String {
    for layer in layers {
        let Ok(root) = RootDirectory::open(layer) else { continue };
        if let Ok(text) = root.read_to_string(Path::new(path)) {
            return text;
        }
        if std::fs::symlink_metadata(layer.join(path)).is_ok() {
            // A whiteout, or something else than a text: the layers below do not count any more.
            return String::new();
        }
    }
    String::new()
}

/// What this process may give to others, from /proc/self/status.
pub fn own_capabilities(status: &str) -> u64 {
    let line = |name: &str| status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix(name)?.trim(), 16).ok());
    line("CapPrm:").unwrap_or(0) & line("CapBnd:").unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_added_and_dropped_but_never_invented() {
        let all = u64::MAX;
        let of = |add: &[&str], drop: &[&str], own| {
            let security = Security {
                add_capabilities: add.iter().map(|s| (*s).to_owned()).collect(),
                drop_capabilities: drop.iter().map(|s| (*s).to_owned()).collect(),
                ..Security::default()
            };
            capabilities(&security, own).map(|c| c.join(" "))
        };
        assert_eq!(of(&["NET_ADMIN"], &["ALL"], all).expect("valid"), "CAP_NET_ADMIN");
        assert_eq!(of(&["CAP_NET_ADMIN"], &["all"], 0).expect("valid"), "");
        assert!(of(&[], &[], all).expect("valid").starts_with("CAP_CHOWN CAP_DAC_OVERRIDE"));
        assert!(!of(&["ALL"], &["SYS_ADMIN"], all).expect("valid").contains("SYS_ADMIN"));
        assert!(of(&["NO_SUCH"], &[], all).is_err());
    }

    #[test]
    fn users_are_looked_up_in_the_image() {
        let root = std::env::temp_dir().join(format!("fairlead-users-{}", std::process::id()));
        std::fs::create_dir_all(root.join("etc")).expect("made");
        std::fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:44::/:/bin/sh\n").expect("written");
        std::fs::write(root.join("etc/group"), "web:x:44:\nextra:x:55:web\n").expect("written");
        let layers = [root.clone()];
        let none = Security::default();
        let of = |security: &Security, user: &str| resolve_user(security, user, &layers);
        let web = User { uid: 33, gid: 44, groups: vec![55] };
        let (by_name, by_id) = (of(&none, "web"), of(&none, "33"));
        let with_group = of(&none, "web:extra");
        let as_user = of(&Security { run_as_user: Some(1000), ..none.clone() }, "web:extra");
        let unknown = of(&none, "nobody-here");
        std::fs::remove_dir_all(&root).expect("removed");
        assert_eq!(by_name.expect("known"), web);
        assert_eq!(by_id.expect("known"), web);
        assert_eq!(with_group.expect("known").gid, 55);
        assert_eq!(as_user.expect("valid"), User { uid: 1000, gid: 0, groups: vec![] });
        assert!(unknown.is_err());
    }
}
