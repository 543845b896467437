//! The images: what is in them and what they run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::Result;

use crate::image::debian::Packages;
use crate::image::tree::Tree;
use crate::shell;

pub struct Recipe {
    pub name: &'static str,
    pub tree: fn(&mut Packages) -> Result<Tree>,
    pub entrypoint: &'static [&'static str],
    pub cmd: &'static [&'static str],
    pub ports: &'static [u16],
}

/// Every nginx writes one line, `IMAGE on POD`, so that a client can count who answered and with what.
pub const RECIPES: &[Recipe] = &[
    Recipe {
        name: "nginx:test1",
        tree: |packages| nginx(packages, "nginx:test1"),
        entrypoint: &["/entrypoint.sh"],
        cmd: &["nginx", "-g", "daemon off;"],
        ports: &[80],
    },
    Recipe {
        name: "nginx:test2",
        tree: |packages| nginx(packages, "nginx:test2"),
        entrypoint: &["/entrypoint.sh"],
        cmd: &["nginx", "-g", "daemon off;"],
        ports: &[80],
    },
    Recipe { name: "busybox:test1", tree: busybox, entrypoint: &[], cmd: &["sh"], ports: &[] },
];

/// A static busybox under all its names, and the few files that name users and hosts.
fn busybox(packages: &mut Packages) -> Result<Tree> {
    let package = packages.tree("busybox-static")?;
    let binary = package.bytes("usr/bin/busybox")?.to_vec();
    let mut tree = Tree::default();
    for applet in applets(&binary)? {
        tree.link(&format!("usr/bin/{applet}"), "busybox");
    }
    tree.file("usr/bin/busybox", 0o755, binary);
    tree.file("etc/passwd", 0o644, PASSWD);
    tree.file("etc/group", 0o644, GROUP);
    for dir in ["dev", "etc", "proc", "root", "run", "sys", "usr/sbin", "usr/lib", "usr/lib64", "var/log"] {
        tree.dir(dir, 0o755);
    }
    tree.dir("tmp", 0o1777);
    Ok(tree)
}

fn nginx(packages: &mut Packages, name: &str) -> Result<Tree> {
    let mut tree = busybox(packages)?;
    tree.add_all(packages.tree("nginx")?.only(|path| path == "usr/sbin/nginx"));
    tree.add_all(packages.tree("nginx-common")?.only(|path| path == "etc/nginx/mime.types"));
    tree.add_all(packages.libraries("nginx")?);
    tree.file("etc/nginx/nginx.conf", 0o644, NGINX_CONF);
    tree.file("entrypoint.sh", 0o755, ENTRYPOINT.replace("IMAGE", name));
    for dir in ["var/lib/nginx", "var/log/nginx", "var/www/html"] {
        tree.dir(dir, 0o755);
    }
    Ok(tree)
}

/// Asks the binary itself, so that the links are those it answers to.
fn applets(binary: &[u8]) -> Result<Vec<String>> {
    let file = shell::target_dir()?.join(format!("images/busybox.{}", std::process::id()));
    fs::write(&file, binary)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    let list = shell::output(Command::new(&file).arg("--list"));
    fs::remove_file(&file)?;
    Ok(list?.lines().map(str::trim).filter(|name| !name.is_empty() && *name != "busybox").map(str::to_owned).collect())
}

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
";

const GROUP: &str = "\
root:x:0:
www-data:x:33:
nogroup:x:65534:
";

const NGINX_CONF: &str = "\
user www-data;
worker_processes 1;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 512; }
http {
  include mime.types;
  default_type text/plain;
  access_log /dev/stdout;
  server {
    listen 80;
    listen [::]:80;
    root /var/www/html;
    location / { try_files $uri /index.html; }
  }
}
";

/// The page is written when the container starts: only then does it have the pod's name.
const ENTRYPOINT: &str = r#"#!/bin/sh
set -e
echo "IMAGE on $(hostname)" > /var/www/html/index.html
exec "$@"
"#;
