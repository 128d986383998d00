// The service worker of a static site. `synpipe export-site` writes a line with SITE = {version, pages, data} before this text.
//
// The worker caches the pages; columns.js caches the data. The worker of a new export has another version and takes over at once.

const scope = self.registration.scope;
const PAGES = `synpipe pages ${scope} `;
const DATA = `synpipe data ${scope}`;

self.addEventListener("install", (event) => event.waitUntil(keepPages()));
self.addEventListener("activate", (event) => event.waitUntil(deleteFormer().then(() => self.clients.claim())));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(scope) && !request.headers.has("range")) {
    event.respondWith(answer(request));
  }
});

async function keepPages() {
  const cache = await caches.open(PAGES + SITE.version);
  await cache.addAll(SITE.pages.map((page) => new Request(new URL(page, scope), { cache: "no-cache" })));
  await self.skipWaiting();
}

async function deleteFormer() {
  for (const name of await caches.keys()) {
    if (name.startsWith(PAGES) && name !== PAGES + SITE.version) await caches.delete(name);
  }
  const data = await caches.open(DATA);
  const kept = SITE.data.map((path) => new URL(path, scope).href);
  for (const { url } of await data.keys()) {
    if (!kept.some((start) => url.startsWith(start))) await data.delete(url);
  }
}

async function answer(request) {
  const address = new URL(request.url);
  address.search = address.hash = "";
  if (address.href === `${scope}index.html`) address.href = scope;
  const cache = await caches.open(PAGES + SITE.version);
  return (await cache.match(address)) ?? fetch(request);
}
