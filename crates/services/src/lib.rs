//! Services and EndpointSlices become one table; who may use which endpoint is decided here, once.
