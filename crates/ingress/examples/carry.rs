//! The proxy with routes of its own, for `cargo xtask bench ingress`: `carry ENDPOINT ROUTES WORKERS` prints its ports for
//! HTTP and HTTPS, and ends when its standard input does. Each line of that is a host, which gets a route then.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, RwLock};

use ingress::{CONTROLLER, Compiler, Proxy, ProxyConfig, Swap, fallback};
use serde_json::json;
use services::ServiceTable;
use tokio_util::sync::CancellationToken;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let endpoint: SocketAddr = args.next().ok_or("ENDPOINT")?.parse()?;
    let routes: u32 = args.next().ok_or("ROUTES")?.parse()?;
    let workers: usize = args.next().ok_or("WORKERS")?.parse()?;
    let mut table = ServiceTable::new();
    let service = json!({"metadata": {"namespace": "bench", "name": "web"},
        "spec": {"clusterIPs": ["10.96.0.1"], "ports": [{"port": 80, "protocol": "TCP"}]}});
    table.upsert_service(service.to_string().as_bytes())?;
    let slice = json!({"metadata": {"namespace": "bench", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "", "port": endpoint.port(), "protocol": "TCP"}],
        "endpoints": [{"addresses": [endpoint.ip()], "conditions": {"ready": true}}]});
    table.upsert_slice(slice.to_string().as_bytes())?;
    let certificate = fallback()?;
    let mut compiler = Compiler::new(CONTROLLER, Arc::new(RwLock::new(table)), certificate.clone());
    compiler.set_class(serde_json::from_value(
        json!({"metadata": {"name": "fairlead"}, "spec": {"controller": CONTROLLER}}),
    )?);
    let backend = json!({"service": {"name": "web", "port": {"number": 80}}});
    for number in 0..routes {
        let path = if number == 0 { "/".to_owned() } else { format!("/p{number}") };
        let host = if number % 2 == 0 { String::new() } else { format!("h{number}.example") };
        let ingress = json!({"metadata": {"namespace": "bench", "name": format!("i{number}")}, "spec": {"ingressClassName": "fairlead",
            "rules": [{"host": host, "http": {"paths": [{"path": path, "pathType": "Prefix", "backend": backend}]}}]}});
        compiler.set_ingress(serde_json::from_value(ingress)?);
    }
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut config = ProxyConfig::new(vec![any], vec![any]);
    config.workers = workers;
    let routes = Arc::new(Swap::new(compiler.routes().unwrap_or_default()));
    let live = routes.clone();
    let certificates = Arc::new(Swap::new(ingress::Certificates::new(certificate)));
    let proxy = Proxy::bind(config, routes, certificates, None)?;
    println!("{} {}", proxy.http()[0].port(), proxy.https()[0].port());
    let token = CancellationToken::new();
    let end = token.clone();
    std::thread::spawn(move || {
        // Whatever is read or not: at the end the one who started us has gone.
        for host in std::io::stdin().lines().map_while(Result::ok) {
            let ingress = json!({"metadata": {"namespace": "bench", "name": host,
                "annotations": {"ingress.fairlead.io/temporal-redirect": "/there"}}, "spec": {"ingressClassName": "fairlead",
                "rules": [{"host": host, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}]}});
            match serde_json::from_value(ingress) {
                Ok(ingress) => compiler.set_ingress(ingress),
                Err(error) => eprintln!("{host}: {error}"),
            }
            if let Some(routes) = compiler.routes() {
                live.store(Arc::new(routes));
            }
        }
        end.cancel();
    });
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(proxy.run(token))?;
    Ok(())
}
