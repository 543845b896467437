//! One node of a lab: a network namespace, a mount namespace with its own /run, a cgroup subtree, a directory.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use ipnet::IpNet;
use linux::cgroup_v1v2::CgroupTree;
use linux::enter::Entry;
use linux::netns::Netns;

use crate::lab::LabError;
use crate::plan::NodePlan;

#[derive(Debug, Clone)]
pub struct LabNode {
    pub name: String,
    /// From 1.
    pub index: u32,
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
    pub pod_cidrs: Vec<IpNet>,
    pub netns: PathBuf,
    pub mntns: PathBuf,
    /// The node's subtree in every hierarchy: `fairlead-ID/node-1`. It holds no process itself, only below.
    pub cgroup: String,
    /// The node's part of the data directory.
    pub dir: PathBuf,
}

impl LabNode {
    pub(crate) fn new(plan: &NodePlan, run_dir: &Path, cgroup: &str, data_dir: &Path) -> Self {
        let addresses = || plan.addresses.iter().map(IpNet::addr);
        Self {
            name: plan.name.clone(),
            index: plan.index,
            ipv4: addresses().find_map(|address| if let IpAddr::V4(v4) = address { Some(v4) } else { None }),
            ipv6: addresses().find_map(|address| if let IpAddr::V6(v6) = address { Some(v6) } else { None }),
            pod_cidrs: plan.pod_cidrs.clone(),
            netns: run_dir.join("ns").join(&plan.name),
            mntns: run_dir.join("mnt").join(&plan.name),
            cgroup: format!("{cgroup}/{}", plan.name),
            dir: data_dir.join("nodes").join(&plan.name),
        }
    }

    /// IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.ipv4.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6)).collect()
    }

    pub fn namespace(&self) -> Result<Netns, LabError> {
        Ok(Netns::open(&self.netns)?)
    }

    /// Everything of the node: agent, pods and what was run by hand.
    pub fn tree(&self) -> Result<CgroupTree, LabError> {
        Ok(CgroupTree::new(self.cgroup.clone())?)
    }

    /// Where the node's own processes are: with cgroup v2 a directory has either processes or limited children.
    pub fn process_cgroup(&self) -> String {
        format!("{}/agent", self.cgroup)
    }

    /// A command that runs inside the node. The running binary has to have the subcommand `enter`.
    pub fn command(
        &self,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Command, LabError> {
        Ok(self.entry().command(program, arguments)?)
    }

    pub fn entry(&self) -> Entry {
        Entry { netns: Some(self.netns.clone()), mntns: Some(self.mntns.clone()), cgroup: Some(self.process_cgroup()) }
    }

    /// Ends every process of the node at once, as a loss of power would. Namespaces and addresses stay.
    pub fn kill(&self) -> Result<(), LabError> {
        Ok(self.tree()?.kill()?)
    }
}
