//! The server as one service: who asks, may they, what is it about, and the verb.

use crate::auth::authenticate::{ForeignCertificate, PeerCertificate, authenticate};
use crate::auth::impersonate::impersonate;
use crate::auth::rbac::{Attributes, Rbac};
use crate::auth::token::TokenKey;
use crate::auth::{Identity, forbidden, named, node};
use crate::body::{self, Body, BoxError};
use crate::cache::WatchCache;
use crate::catalog::{Catalog, builtin};
use crate::decode::MAX_BODY;
use crate::discovery;
use crate::openapi::OpenApi;
use crate::openapi_v2::OpenApiV2;
use crate::registry::{Allocation, Registry};
use crate::request::RequestInfo;
use crate::subresources::{self, Connector};
use crate::verbs::{self, Call};
use api::Status;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::json;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use store::Store;
use tokio_util::sync::CancellationToken;

pub struct Config {
    pub store: Arc<dyn Store>,
    pub allocation: Allocation,
    pub tokens: TokenKey,
    pub connector: Option<Arc<dyn Connector>>,
    pub token: CancellationToken,
}

struct Inner {
    registry: Arc<Registry>,
    tokens: TokenKey,
    openapi: OpenApi,
    openapi_v2: OpenApiV2,
    connector: Option<Arc<dyn Connector>>,
    requests: AtomicU64,
}

/// The API as a tower service. Cheap to clone.
#[derive(Clone)]
pub struct ApiServer {
    inner: Arc<Inner>,
    /// The caller, when it is one of our own components in this process.
    identity: Option<Arc<Identity>>,
}

impl ApiServer {
    /// Opens the catalog over a store.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn start(config: Config) -> Result<ApiServer, store::Error> {
        let catalog = Catalog::new(builtin::rows());
        let cache = WatchCache::start(catalog.clone(), config.store.clone(), config.token.clone()).await?;
        let registry = Arc::new(Registry {
            catalog,
            store: config.store,
            cache,
            allocation: config.allocation,
            rbac: Rbac::default(),
            token: config.token,
        });
        let inner = Inner {
            registry,
            tokens: config.tokens,
            openapi: OpenApi::default(),
            openapi_v2: OpenApiV2::default(),
            connector: config.connector,
            requests: AtomicU64::new(0),
        };
        Ok(ApiServer { inner: Arc::new(inner), identity: None })
    }

    /// The same service for one component, known without credentials because it never leaves the process.
    pub fn as_identity(&self, identity: Identity) -> ApiServer {
        ApiServer { inner: self.inner.clone(), identity: Some(Arc::new(identity)) }
    }

    pub fn registry(&self) -> &Arc<Registry> {
        &self.inner.registry
    }

    pub(crate) fn tokens(&self) -> &TokenKey {
        &self.inner.tokens
    }

    pub(crate) fn connector(&self) -> Option<&Arc<dyn Connector>> {
        self.inner.connector.as_ref()
    }

    /// Answers one request. Never fails: a failure is an answer too.
    pub async fn handle<B>(&self, request: Request<B>) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        self.inner.requests.fetch_add(1, Ordering::Relaxed);
        let head = request.method() == Method::HEAD;
        let mut response = match self.try_handle(request).await {
            Ok(response) => response,
            Err(status) => body::status(&status),
        };
        if head {
            *response.body_mut() = body::full(Bytes::new());
        }
        // What may be kept says so itself.
        response.headers_mut().entry("cache-control").or_insert(HeaderValue::from_static("no-cache, private"));
        response
    }

    async fn try_handle<B>(&self, mut request: Request<B>) -> Result<Response<Body>, Status>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let registry = &self.inner.registry;
        let info = RequestInfo::parse(request.method(), request.uri());
        let who = match &self.identity {
            Some(identity) => (**identity).clone(),
            None => {
                let certificate = request.extensions().get::<PeerCertificate>().cloned();
                let foreign = request.extensions().get::<ForeignCertificate>().is_some();
                if foreign && !request.headers().contains_key("authorization") {
                    return Err(Status::unauthorized());
                }
                authenticate(registry, &self.inner.tokens, request.headers(), certificate.as_ref())?
            }
        };
        let who = impersonate(registry, who, request.headers())?;
        if !info.is_resource {
            return self.path(&info, &who, &request);
        }
        let row = registry.catalog.find(&info.group, &info.version, &info.plural).cloned();
        self.authorize(&info, &who)?;
        let Some(row) = row else {
            if info.plural.is_empty() {
                return discovery::resources(&registry.catalog, &info.group, &info.version)
                    .ok_or_else(Status::no_such_path);
            }
            return Err(Status::no_such_path());
        };
        if !row.namespaced && !info.namespace.is_empty() && *row.kind != *"Namespace" {
            return Err(Status::no_such_path());
        }
        if row.namespaced && info.namespace.is_empty() && !info.name.is_empty() {
            return Err(Status::no_such_path());
        }
        let upgrade = request.headers().contains_key("upgrade").then(|| hyper::upgrade::on(&mut request));
        let (mut parts, incoming) = request.into_parts();
        let body = match Limited::new(incoming, MAX_BODY).collect().await {
            Ok(collected) => collected.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => {
                return Err(Status::too_large(format!("Request entity too large: limit is {MAX_BODY}")));
            }
            Err(error) => return Err(Status::bad_request(format!("the request body could not be read: {error}"))),
        };
        if let Some(query) = parts.uri.query().and_then(|q| HeaderValue::from_str(q).ok()) {
            parts.headers.insert("x-fairlead-query", query);
        }
        let call = Arc::new(Call { registry: registry.clone(), row, info, headers: parts.headers, who, body });
        self.dispatch(&call, upgrade).await
    }

    async fn dispatch(
        &self,
        call: &Arc<Call>,
        upgrade: Option<hyper::upgrade::OnUpgrade>,
    ) -> Result<Response<Body>, Status> {
        let row = &call.row;
        verbs::known_dry_run(call)?;
        if row.is_virtual {
            return match call.info.verb {
                "create" => verbs::review(call, &self.inner.tokens).await,
                _ => Err(Status::method_not_allowed()),
            };
        }
        if !call.info.subresource.is_empty() {
            let known = call.info.subresource == "status" && row.has_status
                || row.subresource(&call.info.subresource).is_some();
            if !known {
                return Err(Status::no_such_path());
            }
            return subresources::serve(self, call, upgrade).await;
        }
        match call.info.verb {
            "get" => verbs::get(call).await,
            "list" => verbs::list(call).await,
            "watch" => verbs::watch(call).await,
            "create" => verbs::create(call).await,
            "update" if !call.info.name.is_empty() => verbs::update(call).await,
            "patch" if !call.info.name.is_empty() => verbs::patch(call).await,
            "delete" => verbs::delete(call).await,
            "deletecollection" => verbs::delete_collection(call).await,
            _ => Err(Status::method_not_allowed()),
        }
    }

    fn authorize(&self, info: &RequestInfo, who: &Identity) -> Result<(), Status> {
        let asked = if info.is_resource && !info.plural.is_empty() {
            Attributes {
                verb: info.verb.into(),
                group: info.group.clone(),
                plural: info.plural.clone(),
                subresource: info.subresource.clone(),
                namespace: info.namespace.clone(),
                name: info.one_name(),
                path: None,
            }
        } else {
            Attributes { verb: info.verb.into(), path: Some(info.path.clone()), ..Attributes::default() }
        };
        let registry = &self.inner.registry;
        if !registry.rbac.allows(registry, who, &asked) {
            return Err(forbidden(who, &asked));
        }
        match node::refuses(registry, who, &asked).or_else(|| named::refuses(registry, who, &asked)) {
            Some(why) => {
                let mut status = forbidden(who, &asked);
                status.message = format!("{}: {why}", status.message);
                Err(status)
            }
            None => Ok(()),
        }
    }

    /// Paths that name no resource.
    fn path<B>(&self, info: &RequestInfo, who: &Identity, request: &Request<B>) -> Result<Response<Body>, Status> {
        let registry = &self.inner.registry;
        self.authorize(info, who)?;
        let headers = request.headers();
        let path = info.path.trim_end_matches('/');
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return Err(Status::method_not_allowed());
        }
        match path {
            "/version" => Ok(body::value(StatusCode::OK, &version())),
            "/api" => Ok(discovery::root(&registry.catalog, headers, true)),
            "/apis" => Ok(discovery::root(&registry.catalog, headers, false)),
            "/openapi/v2" => self.inner.openapi_v2.serve(&registry.catalog, headers),
            "/openapi/v3" => Ok(self.inner.openapi.index(&registry.catalog)),
            "/healthz" | "/livez" | "/readyz" => Ok(body::typed(StatusCode::OK, "text/plain; charset=utf-8", "ok")),
            "/metrics" => {
                let requests = self.inner.requests.load(Ordering::Relaxed);
                let text = format!(
                    "# TYPE apiserver_requests_total counter\napiserver_requests_total {requests}\n# TYPE apiserver_storage_revision gauge\napiserver_storage_revision {}\n",
                    registry.cache.revision()
                );
                Ok(body::typed(StatusCode::OK, "text/plain; version=0.0.4", text))
            }
            "" => {
                let mut paths = vec!["/api".to_string(), "/api/v1".into(), "/apis".into()];
                for (group, versions) in registry.catalog.groups().iter().filter(|(g, _)| !g.is_empty()) {
                    paths.push(format!("/apis/{group}"));
                    paths.extend(versions.iter().map(|v| format!("/apis/{group}/{v}")));
                }
                paths.extend(
                    ["/healthz", "/livez", "/metrics", "/openapi/v2", "/openapi/v3", "/readyz", "/version"]
                        .map(String::from),
                );
                Ok(body::value(StatusCode::OK, &json!({"paths": paths})))
            }
            _ => {
                let document = path.strip_prefix("/openapi/v3/");
                let group = path.strip_prefix("/apis/");
                let answer = match (document, group) {
                    (Some(name), _) => self.inner.openapi.serve(&registry.catalog, name, headers),
                    (_, Some(rest)) => match rest.split_once('/') {
                        Some((group, version)) => discovery::resources(&registry.catalog, group, version),
                        None => discovery::one_group(&registry.catalog, rest),
                    },
                    _ if path == "/api/v1" => discovery::resources(&registry.catalog, "", "v1"),
                    _ => None,
                };
                answer.ok_or_else(Status::no_such_path)
            }
        }
    }
}

fn version() -> serde_json::Value {
    json!({
        "major": "1", "minor": "33", "gitVersion": concat!("v1.33.0+fairlead-", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none", "compiler": "rustc", "platform": "linux/amd64",
    })
}

impl<B> tower::Service<Request<B>> for ApiServer
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let server = self.clone();
        Box::pin(async move { Ok(server.handle(request).await) })
    }
}
