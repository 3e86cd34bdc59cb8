/* Search works from disk too. Browsers refuse to start a worker for a page that was opened from a file, so the script of the
   worker runs in a hidden frame instead. Material for MkDocs looks for the name IFrameWorker. */
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(script) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = `<script src="${new URL(script, location)}"></script>`
      frame.onload = () => {
        this.inside = frame.contentWindow
        this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
        for (const data of this.waiting) this.deliver(data)
      }
      document.body.append(frame)
    }
    postMessage(data) {
      this.inside ? this.deliver(data) : this.waiting.push(data)
    }
    deliver(data) {
      this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }))
    }
  }
  window.Worker = window.IFrameWorker
}
