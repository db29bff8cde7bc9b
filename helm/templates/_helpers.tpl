{{/* Labels of everything that the chart makes. */}}
{{- define "cluster.labels" -}}
{{ include "cluster.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/*
What tells this release's pods from others'. Not app.kubernetes.io/name, which KubeRay writes itself, nor ray.io/cluster,
whose value changes with every upgrade of the RayService.
*/}}
{{- define "cluster.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: {{ .Chart.Name }}
{{- end }}

{{/* The Secret that holds Ray's token. */}}
{{- define "cluster.authSecret" -}}
{{ .Values.auth.existingSecret | default (printf "%s-ray-token" .Release.Name) }}
{{- end }}

{{/* Is Ray alive on this node? The agent of every node answers without a token; on the head it asks for the GCS too. */}}
{{- define "cluster.rayProbe" -}}
httpGet: {path: /api/healthz, port: 52365}
timeoutSeconds: 5
periodSeconds: 10
{{- end }}

{{/*
The pod template of a group. Takes root (the chart's scope), component, container (its name), group (resources, nodeSelector,
tolerations), gpus, ports and readiness (both as in a container).
*/}}
{{- define "cluster.podTemplate" -}}
{{- $root := .root -}}
metadata:
  # Only what selects: KubeRay would replace every pod for a label that carries the chart's version.
  labels:
    {{- include "cluster.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  # Nothing in the pod talks to Kubernetes.
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ int $root.Values.terminationGracePeriodSeconds }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 1000
    seccompProfile: {type: RuntimeDefault}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ printf "%s:%s" $root.Values.image.repository ($root.Values.image.tag | default $root.Chart.AppVersion) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        allowPrivilegeEscalation: false
        capabilities: {drop: [ALL]}
      env:
        # Ray starts workers at nice 15, which starves them beside anything else on the node.
        - {name: RAY_worker_niceness, value: "0"}
        # In the pod, because what the Serve config says of an actor's options replaces all that the application says.
        - {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
        {{- with $root.Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $root.Values.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .ports }}
      ports: {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- range $kind := list "requests" "limits" }}
        {{ $kind }}:
          {{- toYaml (get $.group.resources $kind) | nindent 10 }}
          {{- with $.gpus }}
          nvidia.com/gpu: {{ int . }}
          {{- end }}
        {{- end }}
      # Stated, because KubeRay would else ask Serve's proxies, and there are none.
      livenessProbe:
        {{- include "cluster.rayProbe" . | nindent 8 }}
        initialDelaySeconds: 30
        failureThreshold: 6
      readinessProbe: {{- .readiness | nindent 8 }}
      volumeMounts:
        - {name: shm, mountPath: /dev/shm}
        {{- with $root.Values.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $root.Values.shmSize }}}
    {{- with $root.Values.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
